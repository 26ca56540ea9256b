"""The dear half of verification: every byte's sha256, every count, and that records, manifests and files agree.

Each difference is one `Finding` that names the file and says what to drop: `repair` drops just that, and the next run
computes just that again. Files are hashed side by side, as hashing leaves Python's lock.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifact import named_artifacts
from storage.errors import DamagedError, StoreError
from storage.manifest import Manifest, manifest_key
from storage.parts import FileEntry, PartKey, PartRecord
from storage.store import Store
from storage.table import REJECTS, Table

__all__ = ["Finding", "repair", "verify"]

Kind = Literal[
    "missing", "truncated", "altered", "rows", "schema", "record", "manifest", "stale", "reference"
]

_HELD = 64 << 20  # bytes: files up to here are hashed and parsed from one read


@dataclass(frozen=True)
class Finding:
    """One fault: the file's key, what is wrong, and which part or manifest to drop so that a run makes it anew."""

    kind: Kind
    key: str
    message: str
    part: PartKey | None = None
    manifest: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def verify(
    store: Store,
    manifests: Iterable[Manifest] | None = None,
    *,
    tables: Mapping[str, Table] | None = None,
    workers: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Finding]:
    """Every fault in these artifacts, or in the whole store (artifacts, parts of unfinished runs, runs' names).

    `tables` maps stages to what their tables must satisfy; schemas and references between stages are
    checked for these. `progress` is called with the parts checked so far and their number.
    """
    tables = tables or {}
    known: dict[PartKey, None] = {}
    whole: list[Manifest] = []
    if manifests is None:
        for finding_or_manifest in _all_manifests(store):
            if isinstance(finding_or_manifest, Finding):
                yield finding_or_manifest
            else:
                whole.append(finding_or_manifest)
        known = dict.fromkeys(_all_parts(store))
        yield from _runs(store)
    else:
        whole = list(manifests)
    for manifest in whole:
        known.update(dict.fromkeys(part.key for part in manifest.parts))
    found: dict[PartKey, PartRecord] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        checks = {pool.submit(_check_part, store, key, tables.get(key.stage, Table())): key for key in known}
        for done, check in enumerate(as_completed(checks), start=1):
            record, findings = check.result()
            if record is not None:
                found[record.key] = record
            yield from findings
            if progress is not None:
                progress(done, len(checks))
    digests = {record.fingerprint: record.digest for record in found.values()}
    for record in found.values():
        if record.is_stale(digests):
            message = f"{record.key} was made from other bytes of a parent part than lie in the store now."
            yield Finding("stale", record.key.record, message, part=record.key)
    for manifest in whole:
        yield from _check_manifest(store, manifest, found, tables)


def repair(store: Store, findings: Iterable[Finding]) -> list[str]:
    """Drop what the findings name; the next run computes only that again. Says what was dropped."""
    parts: dict[PartKey, None] = {}
    manifests: dict[str, None] = {}
    for finding in findings:
        if finding.part is not None:
            parts[finding.part] = None
        if finding.manifest is not None:
            manifests[finding.manifest] = None
    for manifest in _all_manifests(store) if parts else ():
        # a manifest is the word that all its parts are there
        if isinstance(manifest, Manifest) and any(record.key in parts for record in manifest.parts):
            manifests[manifest.key] = None
    for name in manifests:
        store.delete(name)
    for key in parts:
        store.discard_part(key)
    return [str(key) for key in parts] + list(manifests)


def _all_manifests(store: Store) -> Iterator[Finding | Manifest]:
    for key in store.list("artifacts"):
        segments = key.split("/")
        if len(segments) == 4 and segments[3] == "manifest.json":
            try:
                manifest = store.manifest(segments[1], segments[2])
            except DamagedError as error:
                yield Finding("manifest", key, str(error), manifest=key)
                continue
            if manifest is not None and manifest.key != key:
                message = f"{key} is the manifest of {manifest.key}: it was moved or copied there by hand."
                yield Finding("manifest", key, message, manifest=key)
            elif manifest is not None:
                yield manifest


def _all_parts(store: Store) -> Iterator[PartKey]:
    for key in store.list("parts"):
        segments = key.removesuffix(".json").split("/")
        if key.endswith(".json") and len(segments) == 4:
            yield PartKey(*segments[1:])


def _runs(store: Store) -> Iterator[Finding]:
    for name in store.runs():
        try:
            run = store.run(name) or {}
        except StoreError as error:
            yield Finding("record", f"runs/{name}.json", str(error))
            continue
        for stage, artifact in named_artifacts(run).items():
            key = manifest_key(stage, artifact)
            if not store.exists(key):
                yield Finding("missing", key, f"run {name} names {stage} {artifact}, and {key} is missing.")


def _check_part(store: Store, key: PartKey, table: Table) -> tuple[PartRecord | None, list[Finding]]:
    try:
        record = store.part(key)
    except DamagedError as error:
        return None, [Finding("record", key.record, str(error), part=key)]
    if record is None:
        return None, [Finding("missing", key.record, f"{key}: its record {key.record} is missing.", part=key)]
    findings = [
        finding for entry in record.files if (finding := _check_file(store, record, entry, table)) is not None
    ]
    return record, findings


def _check_file(store: Store, record: PartRecord, entry: FileEntry, table: Table) -> Finding | None:
    def fault(kind: Kind, message: str) -> Finding:
        return Finding(kind, entry.key, f"{record.key}: {entry.key} {message}", part=record.key)

    size = store.files.size(entry.key)
    if size is None:
        return fault("missing", "is missing.")
    if size != entry.bytes:
        return fault("truncated", f"has {size} bytes, {entry.bytes} were committed.")
    with store.open_input(entry.key) as file:
        held = io.BytesIO(file.read()) if size <= _HELD else file
        hasher = hashlib.sha256()
        while chunk := held.read(1 << 20):
            hasher.update(chunk)
        if hasher.hexdigest() != entry.sha256:
            return fault("altered", f"has the sha256 {hasher.hexdigest()}, {entry.sha256} was committed.")
        is_rejects = entry == record.rejects_file
        if entry != record.table and not is_rejects:
            return None
        held.seek(0)
        try:
            with pq.ParquetFile(held) as opened:
                rows, schema = opened.metadata.num_rows, opened.schema_arrow
        except (pa.ArrowInvalid, OSError) as error:
            return fault("altered", f"is not readable as Parquet: {error}.")
    expected_rows = record.rejects if is_rejects else record.rows
    if rows != expected_rows:
        return fault("rows", f"has {rows} rows, its record says {expected_rows}.")
    if difference := _schema_difference(schema, REJECTS if is_rejects else table.schema):
        return fault("schema", f"does not fit the stage's schema: {difference}.")
    return None


def _schema_difference(got: pa.Schema, expected: pa.Schema) -> str:
    differences = []
    for field in expected:
        at = got.get_field_index(field.name)
        if at < 0:
            differences.append(f"column {field.name} is missing")
        elif got.field(at).type != field.type:
            differences.append(f"column {field.name} is {got.field(at).type}, expected {field.type}")
    return "; ".join(differences)


def _check_manifest(
    store: Store, manifest: Manifest, found: dict[PartKey, PartRecord], tables: Mapping[str, Table]
) -> Iterator[Finding]:
    def fault(message: str, kind: Kind = "manifest", key: str = manifest.key) -> Finding:
        return Finding(
            kind, key, f"{manifest.stage} artifact {manifest.fingerprint}: {message}", manifest=manifest.key
        )

    for record in manifest.parts:
        stored = found.get(record.key)
        if stored is not None and stored != record:
            changed = [name for name in record.to_json() if getattr(record, name) != getattr(stored, name)]
            yield fault(f"{manifest.key} and {record.key.record} disagree in {', '.join(changed)}.")
    for name in ("rows", "bytes", "rejects"):
        total = sum(getattr(record, name) for record in manifest.parts)
        if getattr(manifest, name) != total:
            yield fault(f"{manifest.key} says {getattr(manifest, name)} {name}, its parts have {total}.")
    if manifest.rejects:
        try:
            with store.open_input(manifest.rejects_key) as file:
                rows = pq.read_metadata(file).num_rows
            if rows != manifest.rejects:
                yield fault(
                    f"its rejects have {rows} rows, expected {manifest.rejects}.",
                    "rows",
                    manifest.rejects_key,
                )
        except FileNotFoundError:
            yield fault(f"{manifest.rejects_key} is missing.", "missing", manifest.rejects_key)
        except (pa.ArrowInvalid, OSError) as error:
            yield fault(f"{manifest.rejects_key} is not readable: {error}.", "altered", manifest.rejects_key)
    if all(record.key in found for record in manifest.parts):
        yield from _references(store, manifest, tables)


def _references(store: Store, manifest: Manifest, tables: Mapping[str, Table]) -> Iterator[Finding]:
    """Rows whose key is not among the rows of a parent stage's table."""
    import polars as pl

    for stage, artifact in manifest.parents.items():
        parent_table, own_table = (tables.get(name, Table()) for name in (stage, manifest.stage))
        columns = [
            name for name in parent_table.key if _is_shared(name, parent_table.schema, own_table.schema)
        ]
        try:
            parent = store.manifest(stage, artifact)
        except DamagedError:
            continue  # told by itself
        if parent is None or not columns or not parent.parts or not manifest.parts:
            continue
        try:
            kept = store.scan(parent.parts).select(columns)
            own = store.scan(manifest.parts).select(columns)
            orphans = own.join(kept, on=columns, how="anti").unique().head(1).collect()
        except (pl.exceptions.PolarsError, OSError):
            continue  # an unreadable file is told by itself
        if orphans.height:
            row: dict[str, Any] = orphans.row(0, named=True)
            yield Finding(
                "reference",
                manifest.key,
                f"{manifest.stage} artifact {manifest.fingerprint} has the row {row}, which its parent {stage} "
                f"{artifact} does not have.",
                manifest=manifest.key,
            )


def _is_shared(column: str, parent: pa.Schema, child: pa.Schema) -> bool:
    return column in child.names and child.field(column).type == parent.field(column).type
