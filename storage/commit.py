"""How a part becomes visible: payload first, its record last. Nothing that exists is overwritten.

Rows are streamed to a temporary file. The borders of row groups depend on the rows alone, so equal
rows give equal bytes, whatever tables they came in. Then, in this order: rejects, payload, record.
A kill in between leaves files that no record names.

The payload is created and never replaced. Where a killed or a faster run left one, it is adopted:
it is complete and has the same fingerprint, and the record then describes the file in the store.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import pyarrow as pa
import pyarrow.parquet as pq

from storage.contents import again
from storage.crashpoints import crash_point
from storage.errors import DamagedError, SchemaError, StoreError
from storage.files import plain_errors
from storage.fingerprints import canonical_json, file_digest, stream_digest
from storage.manifest import code_version, now
from storage.names import check_key, check_name
from storage.parts import FileEntry, PartKey, PartRecord
from storage.remote import Files
from storage.table import REJECTS, Table, check_unique, conform

Rejects: TypeAlias = "pa.Table | Callable[[], pa.Table | None] | None"
"""The rejected rows: a table, or a function that is called once all rows are written."""

_TABLE_FILE, _REJECTS_FILE = "table.parquet", "rejects.parquet"
_STEP = 1024  # rows: incoming tables are cut and joined to this grid before row groups are formed
_MAX_BYTES = 64 << 20  # of one row group


class Provenance(TypedDict, total=False):
    """What a record says about how its part was computed."""

    parents: Mapping[str, str] | None
    """Fingerprint of each parent part -> its digest."""
    metadata: Mapping[str, Any] | None
    """Any JSON values."""
    seconds: float
    """How long the computation took."""


class PartWriter:
    """Commits, finds and discards parts. `Store` inherits these methods."""

    files: Files

    def commit_part(
        self,
        key: PartKey,
        tables: pa.Table | Iterable[pa.Table],
        *,
        table: Table | None = None,
        rejects: Rejects = None,
        replace: bool = False,
        **provenance: Unpack[Provenance],
    ) -> PartRecord:
        """Write a part's rows and commit it; raises SchemaError where they do not satisfy `table`.

        `tables` may be an iterator: row groups are written as they fill. Without a `table` any rows
        are accepted. A part that is already committed stays and its record is returned. With
        `replace` it is discarded once the new rows are written.
        """
        if not replace and (existing := self.part(key)) is not None:
            return existing
        _check_provenance(provenance)
        files = self.files
        scratch = files.scratch(key.table)
        try:
            stream = [tables] if isinstance(tables, pa.Table) else tables
            rows = _write_table(scratch, key, stream, table or Table())
            rejected = rejects() if callable(rejects) else rejects
            payload = FileEntry(_TABLE_FILE, key.table, scratch.stat().st_size, file_digest(scratch))
            if replace:
                self.discard_part(key)
            entries = [payload, *_write_rejects(files, key, rejected, payload.sha256)]
            if not files.create_from(key.table, scratch):
                adopted = _adopt(files, key)
                if adopted is None:
                    self.discard_part(key)
                    entries = [payload, *_write_rejects(files, key, rejected, payload.sha256)]
                    files.create_from(key.table, scratch)
                elif adopted[0] != payload:
                    for entry in entries[1:]:
                        files.delete(entry.key)
                    entries, rows = adopted, _parquet_rows(files, key.table)
        finally:
            scratch.unlink(missing_ok=True)
        rejects_count = sum(_parquet_rows(files, entry.key) for entry in entries[1:])
        return self._write_record(key, entries, rows, rejects_count, provenance)

    def commit_folder(
        self,
        key: PartKey,
        folder: Path,
        *,
        rows: int = 0,
        replace: bool = False,
        **provenance: Unpack[Provenance],
    ) -> PartRecord:
        """Copy a local folder (a trained model) into the store as one part and commit it."""
        if not replace and (existing := self.part(key)) is not None:
            return existing
        _check_provenance(provenance)
        sources = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        if not sources:
            raise StoreError(f"{key}: the folder {folder} holds no files, so there is nothing to commit.")
        digests = {check_key(name): file_digest(path) for name, path in sources.items()}
        root = f"{key.folder}/{hashlib.sha256(canonical_json(digests)).hexdigest()[:12]}"
        if replace:
            self.discard_part(key)
        entries = []
        for name, path in sources.items():
            entry = FileEntry(name, f"{root}/{name}", path.stat().st_size, digests[name])
            if not self.files.copy_from(entry.key, path) and self.files.size(entry.key) != entry.bytes:
                raise DamagedError(
                    f"{key}: {entry.key} exists, but its size is not {entry.bytes} bytes. "
                    "Delete that file and start again."
                )
            entries.append(entry)
        return self._write_record(key, entries, rows, 0, provenance)

    def discard_part(self, key: PartKey) -> None:
        """Delete a part, so that the next run computes it again.

        A marker file is written first and deleted last. A payload next to a marker is never
        adopted.
        """
        marker = _marker(key)
        try:
            record = self.part(key)
        except DamagedError:
            record = None
        self.files.write(marker, b"{}\n")
        self.files.delete(key.record)
        names = {key.table}
        if record is not None:
            names |= {entry.key for entry in record.files}
        else:
            rejects = f"rejects/{key.stage}/{key.family}"
            names |= {info.key for info in self.files.list(key.folder)}
            names |= {
                info.key
                for info in self.files.list(rejects)
                if info.key.startswith(f"{rejects}/{key.fingerprint}-")
            }
        for name in sorted(names):
            self.files.delete(name)
        self.files.delete(marker)

    def part(self, key: PartKey) -> PartRecord | None:
        """The record of a committed part; None where it is not committed; raises DamagedError."""
        return self.find_parts([key]).get(key.fingerprint)

    def find_parts(self, keys: Iterable[PartKey], *, required: bool = False) -> dict[str, PartRecord]:
        """The committed ones of these parts: fingerprint -> record. Reads in parallel.

        Raises DamagedError for a damaged record and, if `required`, for a missing one.
        """
        wanted = {key.record: key for key in keys}
        found: dict[str, PartRecord] = {}

        def read() -> None:
            fault = None
            for name, data in self.files.read_many(list(wanted)).items():
                key = wanted[name]
                try:
                    found[key.fingerprint] = PartRecord.from_file(data, key)
                    del wanted[name]
                except DamagedError as error:
                    fault = error
            if wanted and required:
                fault = fault or DamagedError(
                    f"{next(iter(wanted))} is missing, one of {len(wanted)} parts that are needed. "
                    "`qrpo verify --repair` computes only these again."
                )
            if fault is not None:
                raise fault

        again(self.files, read)
        return found

    def family_parts(self, stage: str, family: str) -> list[PartRecord]:
        """All committed parts of a family, by a listing, in the order of fingerprints."""
        prefix = f"parts/{check_name(stage, 'stage')}/{check_name(family, 'family')}/"
        names = (info.key.removeprefix(prefix) for info in self.files.list(prefix[:-1]))
        records = [name.removesuffix(".json") for name in names if name.endswith(".json") and "/" not in name]
        return list(self.find_parts(PartKey(stage, family, name) for name in records).values())

    def _write_record(
        self, key: PartKey, entries: list[FileEntry], rows: int, rejects: int, provenance: Provenance
    ) -> PartRecord:
        record = PartRecord(
            stage=key.stage,
            family=key.family,
            fingerprint=key.fingerprint,
            files=tuple(entries),
            rows=rows,
            rejects=rejects,
            parents=dict(provenance.get("parents") or {}),
            metadata=dict(provenance.get("metadata") or {}),
            code_version=code_version(),
            created=now(),
            seconds=round(provenance.get("seconds", 0.0), 3),
            checked=True,
        )
        data = record.to_file()
        if self.files.create(key.record, data):
            return PartRecord.from_file(data, key)  # as every later reader sees it
        committed = self.part(key)  # another run was first
        if committed is None:
            raise StoreError(
                f"{key}: its record appeared and vanished while it was written. Start the same command again."
            )
        return committed


def _check_provenance(provenance: Provenance) -> None:
    """Raise where a record could not hold these values, before anything is written."""
    canonical_json([dict(provenance.get("parents") or {}), dict(provenance.get("metadata") or {})])


def _marker(key: PartKey) -> str:
    return f"{key.folder}.discarded"


def _adopt(files: Files, key: PartKey) -> list[FileEntry] | None:
    """The files of a payload that exists without a record.

    None where a killed `discard_part` left the payload, or where a page checksum shows that it is
    damaged.
    """
    if files.size(_marker(key)) is not None:
        return None
    try:
        with (
            files.open_input(key.table) as file,
            pq.ParquetFile(file, page_checksum_verification=True) as opened,
        ):
            for _ in opened.iter_batches():
                pass
    except (pa.ArrowInvalid, OSError):
        return None
    payload = _entry(files, _TABLE_FILE, key.table)
    rejects = key.rejects(payload.sha256)
    return [payload] if files.size(rejects) is None else [payload, _entry(files, _REJECTS_FILE, rejects)]


def _entry(files: Files, name: str, key: str) -> FileEntry:
    with files.open_input(key) as file:
        digest = stream_digest(file)
        return FileEntry(name, key, file.seek(0, os.SEEK_END), digest)


def _parquet_rows(files: Files, key: str) -> int:
    with files.open_input(key) as file:
        return int(pq.read_metadata(file).num_rows)


def _write_rejects(files: Files, key: PartKey, rejects: pa.Table | None, sha256: str) -> list[FileEntry]:
    if rejects is None or rejects.num_rows == 0:
        return []
    table = conform(rejects, REJECTS, f"the rejects of {key}")
    target = key.rejects(sha256)
    scratch = files.scratch(target)
    try:
        pq.write_table(table, scratch, compression="zstd", write_page_checksum=True)
        files.create_from(target, scratch)  # an existing file belongs to the same payload: it stays
    finally:
        scratch.unlink(missing_ok=True)
    return [_entry(files, _REJECTS_FILE, target)]


def _write_table(scratch: Path, key: PartKey, tables: Iterable[pa.Table], table: Table) -> int:
    """Write the rows as Parquet and check them; how many there are."""
    disk = partial(plain_errors, scratch.parent, scratch.name, writing=True)
    groups = _row_groups(tables, table, key)
    first = next(groups)
    with disk():
        file = open(scratch, "xb")  # noqa: SIM115
    crash_point("scratch-opened", key.table)
    writer = pq.ParquetWriter(
        file,
        first.schema,
        compression="zstd",
        use_dictionary=[path for field in first.schema for path in _dictionary_paths(field)],
        write_page_index=True,
        write_page_checksum=True,
    )
    written = 0
    try:
        for group in chain([first], groups):
            table.check(group, f"{key}, rows from {written}")
            with disk():
                if group.num_rows:
                    writer.write_table(group, row_group_size=group.num_rows)
                file.flush()
            written += group.num_rows
            crash_point("scratch-half", key.table)
        with disk():
            writer.close()
            file.flush()
    finally:
        with suppress(OSError):
            writer.close()
            file.close()
    crash_point("scratch-written", key.table)
    if table.key:
        check_unique(scratch, table.key, str(key))
    return written


def _dictionary_paths(field: pa.Field, prefix: str = "") -> Iterator[str]:
    """The Parquet paths of a field's leaves, without floats: their dictionaries save little."""
    kind, path = field.type, f"{prefix}{field.name}"
    if pa.types.is_struct(kind):
        for inner in kind:
            yield from _dictionary_paths(inner, f"{path}.")
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _dictionary_paths(kind.value_field.with_name("element"), f"{path}.list.")
    elif not pa.types.is_floating(kind):
        yield path


def _row_groups(tables: Iterable[pa.Table], table: Table, key: PartKey) -> Iterator[pa.Table]:
    """The rows as one contiguous table per row group; at least one table, possibly without rows."""
    group: list[pa.Table] = []
    rows = size = 0
    empty = True
    for step in _steps(tables, table.schema, key):
        group.append(step)
        rows += step.num_rows
        size += step.nbytes
        if rows >= table.group_rows or size >= _MAX_BYTES:
            yield pa.concat_tables(group).combine_chunks()
            group, rows, size, empty = [], 0, 0, False
    if group and (rows or empty):
        yield pa.concat_tables(group).combine_chunks()
    elif empty:
        if not table.schema.names:
            raise SchemaError(f"{key}: neither rows nor a schema were given, so the columns are unknown.")
        yield table.schema.empty_table()


def _steps(tables: Iterable[pa.Table], schema: pa.Schema, key: PartKey) -> Iterator[pa.Table]:
    """The rows in tables of _STEP rows, whatever the sizes of the given tables."""
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
        start = 0
        while start < table.num_rows:
            piece = table.slice(start, _STEP - rows)
            held.append(piece)
            rows += piece.num_rows
            start += piece.num_rows
            if rows == _STEP:
                yield pa.concat_tables(held).combine_chunks()
                held, rows = [], 0
        if not table.num_rows and not held:
            held.append(table)
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
