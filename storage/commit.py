"""How a part becomes visible: payload first, its record last, and nothing that exists is ever written over.

Rows are streamed to a temporary file in row groups whose borders depend on the rows alone, so equal rows give equal
bytes however they arrived. Then, in this order: rejects, payload, record. A kill in between leaves files that no
record names. The payload is created, never replaced: where a killed or a faster run left one, that one is taken as
it is (it is whole, and of the same fingerprint), so that whoever writes the record describes what lies there.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from storage.crashpoints import crash_point
from storage.errors import DamagedError, SchemaError, StoreError
from storage.files import Files, plain_errors
from storage.fingerprints import canonical_json, file_digest
from storage.manifest import code_version, now
from storage.names import check_key
from storage.parts import FileEntry, PartKey, PartRecord, sealed, unsealed
from storage.table import REJECTS, Table, UniqueKeys, conform

__all__ = ["Rejects", "commit_folder", "commit_part", "discard_part", "load_record"]

Rejects: TypeAlias = "pa.Table | Callable[[], pa.Table | None] | None"
"""The rows left out: a table, or a function that is asked for it once all rows are written."""

_TABLE_FILE, _REJECTS_FILE = "table.parquet", "rejects.parquet"
_STEP = 1024  # rows: incoming tables are cut and joined to this grid before row groups are formed
_MOST_BYTES = 64 << 20
_CHUNK = 1 << 20


def commit_part(
    files: Files,
    key: PartKey,
    tables: pa.Table | Iterable[pa.Table],
    *,
    table: Table | None = None,
    rejects: Rejects = None,
    parents: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
    replace: bool = False,
) -> PartRecord:
    """Write a part's rows and commit it; the record of the part that is there afterwards."""
    if not replace and (existing := load_record(files, key)) is not None:
        return existing
    canonical_json([dict(parents or {}), dict(metadata or {})])  # refuse what cannot be noted before writing
    scratch = files.scratch(key.table)
    try:
        stream = [tables] if isinstance(tables, pa.Table) else tables
        rows = _write_table(scratch, key, stream, table or Table())
        left_out = rejects() if callable(rejects) else rejects
        payload = FileEntry(_TABLE_FILE, key.table, scratch.stat().st_size, file_digest(scratch))
        if replace:
            discard_part(files, key)
        entries = [payload, *_write_rejects(files, key, left_out, payload.sha256)]
        if not files.create_from(key.table, scratch):
            found = _adopted(files, key)
            if found is None:
                discard_part(files, key)
                entries = [payload, *_write_rejects(files, key, left_out, payload.sha256)]
                files.create_from(key.table, scratch)
            elif found[0] != payload:
                for entry in entries[1:]:
                    files.delete(entry.key)
                entries, rows = found, _parquet_rows(files, key.table)
    finally:
        scratch.unlink(missing_ok=True)
    rejected = sum(_parquet_rows(files, entry.key) for entry in entries[1:])
    return _record(files, key, entries, rows, rejected, parents, metadata, seconds)


def commit_folder(
    files: Files,
    key: PartKey,
    folder: Path,
    *,
    rows: int = 0,
    parents: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
    replace: bool = False,
) -> PartRecord:
    """Copy every file of a local folder into the store and commit it as one part."""
    if not replace and (existing := load_record(files, key)) is not None:
        return existing
    canonical_json([dict(parents or {}), dict(metadata or {})])
    sources = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    if not sources:
        raise StoreError(f"{key}: the folder {folder} holds no files, so there is nothing to commit.")
    digests = {check_key(name): file_digest(path) for name, path in sources.items()}
    root = f"{key.folder}/{hashlib.sha256(canonical_json(digests)).hexdigest()[:12]}"
    if replace:
        discard_part(files, key)
    entries = []
    for name, path in sources.items():
        entry = FileEntry(name, f"{root}/{name}", path.stat().st_size, digests[name])
        if not files.copy_from(entry.key, path) and files.size(entry.key) != entry.bytes:
            raise DamagedError(
                f"{key}: {entry.key} is there with another size than {entry.bytes} bytes. Delete that file and start again."
            )
        entries.append(entry)
    return _record(files, key, entries, rows, 0, parents, metadata, seconds)


def discard_part(files: Files, key: PartKey) -> None:
    """Take a part out of the store, so that the next run computes it again.

    A mark is written first and removed last: a payload beside it is never taken for one that a killed run left whole.
    """
    mark = f"{key.folder}.discarded"
    try:
        record = load_record(files, key)
    except DamagedError:
        record = None
    files.write(mark, b"{}\n")
    files.delete(key.record)
    doomed = {entry.key for entry in record.files} if record else set()
    if record is None:
        doomed |= {info.key for info in files.list(key.folder)}
        prefix = f"rejects/{key.stage}/{key.family}"
        doomed |= {
            info.key for info in files.list(prefix) if info.key.startswith(f"{prefix}/{key.fingerprint}-")
        }
    for name in sorted(doomed | {key.table}):
        files.delete(name)
    files.delete(mark)


def load_record(files: Files, key: PartKey) -> PartRecord | None:
    """The record of a committed part; None where it is not committed; raises DamagedError."""
    try:
        data = files.read(key.record)
    except FileNotFoundError:
        return None
    return parse_record(data, key)


def parse_record(data: bytes, key: PartKey) -> PartRecord:
    """The record in a record's file; raises DamagedError where it is not this part's or was edited."""
    value = unsealed(data, f"the record {key.record}")
    try:
        record = PartRecord.from_json(value)
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedError(f"{key.record} is not a part's record of this version: {error}.") from None
    if record.key != key:
        raise DamagedError(
            f"{key.record} is the record of {record.key}: it was moved or copied there by hand."
        )
    return record


def _adopted(files: Files, key: PartKey) -> list[FileEntry] | None:
    """The files of a payload that lies there without a record; None where it is not to be kept.

    Not kept is what a killed `discard_part` left, and what is not Parquet at all.
    """
    if files.size(f"{key.folder}.discarded") is not None:
        return None
    try:
        _parquet_rows(files, key.table)
    except pa.ArrowInvalid:
        return None
    table = _entry(files, _TABLE_FILE, key.table)
    rejects = key.rejects(table.sha256)
    return [table] if files.size(rejects) is None else [table, _entry(files, _REJECTS_FILE, rejects)]


def _entry(files: Files, name: str, key: str) -> FileEntry:
    hasher, size = hashlib.sha256(), 0
    with files.open_input(key) as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            size += len(chunk)
    return FileEntry(name, key, size, hasher.hexdigest())


def _parquet_rows(files: Files, key: str) -> int:
    with files.open_input(key) as file:
        return int(pq.read_metadata(file).num_rows)


def _record(
    files: Files,
    key: PartKey,
    entries: list[FileEntry],
    rows: int,
    rejects: int,
    parents: Mapping[str, str] | None,
    metadata: Mapping[str, Any] | None,
    seconds: float,
) -> PartRecord:
    record = PartRecord(
        stage=key.stage,
        family=key.family,
        fingerprint=key.fingerprint,
        files=tuple(entries),
        rows=rows,
        rejects=rejects,
        parents=dict(parents or {}),
        metadata=dict(metadata or {}),
        code_version=code_version(),
        created=now(),
        seconds=round(seconds, 3),
    )
    data = sealed(record.to_json())
    if files.create(key.record, data):
        return parse_record(data, key)  # as every later reader sees it
    committed = load_record(files, key)  # another run was first
    if committed is None:
        raise StoreError(
            f"{key}: its record appeared and vanished while it was written. Start the same command again."
        )
    return committed


def _write_rejects(files: Files, key: PartKey, rejects: pa.Table | None, sha256: str) -> list[FileEntry]:
    if rejects is None or rejects.num_rows == 0:
        return []
    table = conform(rejects, REJECTS, f"the rejects of {key}")
    target = key.rejects(sha256)
    scratch = files.scratch(target)
    try:
        pq.write_table(table, scratch, compression="zstd")
        files.create_from(target, scratch)  # one that is there belongs to the same payload: it stays
    finally:
        scratch.unlink(missing_ok=True)
    return [_entry(files, _REJECTS_FILE, target)]


def _write_table(scratch: Path, key: PartKey, tables: Iterable[pa.Table], table: Table) -> int:
    keys = UniqueKeys(table.key, str(key))
    writer: pq.ParquetWriter | None = None
    written = 0
    disk = partial(plain_errors, scratch.parent, scratch.name, writing=True)
    with disk():
        file = open(scratch, "xb")  # noqa: SIM115
    try:
        crash_point("scratch-opened", key.table)
        for group in _row_groups(tables, table, key):
            table.check(group, f"{key}, rows from {written}")
            keys.add(group)
            with disk():
                if writer is None:
                    writer = pq.ParquetWriter(
                        file,
                        group.schema,
                        compression="zstd",
                        use_dictionary=[leaf for field in group.schema for leaf in _repeating(field)],
                        write_page_index=True,
                    )
                if group.num_rows:
                    writer.write_table(group, row_group_size=group.num_rows)
                file.flush()
            written += group.num_rows
            crash_point("scratch-half", key.table)
        with disk():
            if writer is not None:
                writer.close()
            file.flush()
    finally:
        with suppress(OSError):
            if writer is not None:
                writer.close()
            file.close()
    crash_point("scratch-written", key.table)
    keys.finish(scratch)
    return written


def _repeating(field: pa.Field, at: str = "") -> Iterator[str]:
    """The Parquet paths of a field's leaves but for floats: a dictionary of those costs much and seldom helps."""
    kind, path = field.type, f"{at}{field.name}"
    if pa.types.is_struct(kind):
        for inner in kind:
            yield from _repeating(inner, f"{path}.")
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _repeating(kind.value_field.with_name("element"), f"{path}.list.")
    elif not pa.types.is_floating(kind):
        yield path


def _row_groups(tables: Iterable[pa.Table], table: Table, key: PartKey) -> Iterator[pa.Table]:
    """The rows again, as one contiguous table for each row group; at least one table, perhaps without rows."""
    group: list[pa.Table] = []
    rows = size = 0
    yielded = False
    for step in _steps(tables, table.schema, key):
        group.append(step)
        rows += step.num_rows
        size += step.nbytes
        if rows >= table.group_rows or size >= _MOST_BYTES:
            yield pa.concat_tables(group).combine_chunks()
            group, rows, size, yielded = [], 0, 0, True
    if rows or not yielded:
        if not group and not table.schema.names:
            raise SchemaError(f"{key}: neither rows nor a schema were given, so the columns are unknown.")
        yield pa.concat_tables(group).combine_chunks() if group else table.schema.empty_table()


def _steps(tables: Iterable[pa.Table], schema: pa.Schema, key: PartKey) -> Iterator[pa.Table]:
    """The rows again in tables of _STEP rows, whatever the sizes that they came in."""
    held: list[pa.Table] = []
    rows = 0
    first: pa.Schema | None = None
    for table in tables:
        table = conform(table, schema, str(key)).replace_schema_metadata(None)
        first = first or table.schema
        if table.schema != first:
            raise SchemaError(
                f"{key}: its tables have different columns: {_columns(first)}, then {_columns(table.schema)}. "
                "Give every table of a part the same columns in the same order."
            )
        at = 0
        while at < table.num_rows:
            piece = table.slice(at, _STEP - rows)
            held.append(piece)
            rows += piece.num_rows
            at += piece.num_rows
            if rows == _STEP:
                yield pa.concat_tables(held).combine_chunks()
                held, rows = [], 0
        if not table.num_rows and not held:
            held.append(table)
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
