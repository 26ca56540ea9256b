"""Verification: every byte's sha256, every count, and that records, manifests and files agree.

Each fault is a `Finding` with the part or manifest to discard. `repair` discards these, and the
next run computes only them again. Files are hashed in threads: hashing releases Python's lock.

A part whose parent's file is altered is a fault too where its record does not say that the parent's
bytes were checked when they were read (`PartRecord.checked`): it may have been computed from the
altered bytes. Its own descendants then follow from its digest: they stay if it comes out the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifact import named_artifacts
from storage.contents import again, open_checked
from storage.errors import DamagedError, StoreError
from storage.manifest import Manifest, manifest_key
from storage.parts import FileEntry, PartKey, PartRecord
from storage.store import Store
from storage.table import REJECTS, Table

Kind = Literal[
    "missing", "truncated", "altered", "rows", "schema", "record", "manifest", "run", "stale", "reference"
]


@dataclass(frozen=True)
class Finding:
    """One fault: the key of the file, what is wrong, and the part or manifest to discard."""

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
    """Every fault in these artifacts, or in the whole store: artifacts, other parts, runs.

    `tables` maps stages to the requirements of their tables; schemas and references between stages
    are checked for these. `progress` gets the number of parts checked so far and their total.
    """
    tables = tables or {}
    artifacts = list(manifests or ())
    keys: dict[PartKey, None] = {}
    if manifests is None:
        for found in _all_manifests(store):
            if isinstance(found, Finding):
                yield found
            else:
                artifacts.append(found)
        names = [key.removesuffix(".json").split("/") for key in store.list("parts") if key.endswith(".json")]
        keys = {PartKey(*name[1:]): None for name in names if len(name) == 4}
        yield from _check_runs(store)
    keys.update((record.key, None) for manifest in artifacts for record in manifest.parts)
    records: dict[PartKey, PartRecord] = {}
    altered: set[str] = set()
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        checks = [pool.submit(_check_part, store, key, tables.get(key.stage, Table())) for key in keys]
        for done, check in enumerate(as_completed(checks), start=1):
            record, findings = check.result()
            if record is not None:
                records[record.key] = record
                payload = {entry.key for entry in record.payload}
                altered |= {record.fingerprint for fault in findings if fault.key in payload}
            yield from findings
            if progress is not None:
                progress(done, len(checks))
    digests = {record.fingerprint: record.digest for record in records.values()}
    for record in records.values():
        if record.is_stale(digests):
            message = f"{record.key} was computed from other bytes of a parent part than the store has now."
        elif not record.checked and (suspect := altered.intersection(record.parents)):
            message = f"{record.key} may have been computed from the altered bytes of part {min(suspect)}."
        else:
            continue
        yield Finding("stale", record.key.record, message, part=record.key)
    for manifest in artifacts:
        yield from _check_manifest(store, manifest, records)
        if all(record.key in records for record in manifest.parts):
            yield from _check_references(store, manifest, tables)


def repair(store: Store, findings: Iterable[Finding]) -> list[str]:
    """Discard the parts and manifests that the findings name, and every manifest of such a part.

    The next run computes only these again. A damaged note of a run is set aside. Returns the names
    of what was discarded.
    """
    findings = list(findings)
    parts = dict.fromkeys(finding.part for finding in findings if finding.part is not None)
    manifests = dict.fromkeys(finding.manifest for finding in findings if finding.manifest is not None)
    for manifest in _all_manifests(store) if parts else ():
        if isinstance(manifest, Manifest) and any(record.key in parts for record in manifest.parts):
            manifests[manifest.key] = None
    for name in manifests:
        store.delete(name)
    for key in parts:
        store.discard_part(key)
    notes = [finding.key for finding in findings if finding.kind == "run"]
    for note in notes:
        store.set_aside_run(note.removeprefix("runs/").removesuffix(".json"))
    return [*map(str, parts), *manifests, *notes]


def _all_manifests(store: Store) -> Iterator[Finding | Manifest]:
    for key in store.list("artifacts"):
        segments = key.split("/")
        if len(segments) != 4 or segments[3] != "manifest.json":
            continue
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


def _check_runs(store: Store) -> Iterator[Finding]:
    for name in store.runs():
        try:
            run = store.run(name) or {}
        except StoreError as error:
            yield Finding("run", f"runs/{name}.json", str(error))
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
    faults = ((entry, _file_fault(store, record, entry, table)) for entry in record.files)
    return record, [
        Finding(fault[0], entry.key, fault[1], part=key) for entry, fault in faults if fault is not None
    ]


def _file_fault(store: Store, record: PartRecord, entry: FileEntry, table: Table) -> tuple[Kind, str] | None:
    try:
        file = open_checked(store.files, entry, record)
    except DamagedError as error:
        size = store.files.size(entry.key)
        kind: Kind = "missing" if size is None else "altered" if size == entry.bytes else "truncated"
        return kind, str(error)
    if entry == record.rejects_file:
        expected_rows, schema = record.rejects, REJECTS
    elif entry == record.table:
        expected_rows, schema = record.rows, table.schema
    else:
        return None
    try:
        with pq.ParquetFile(file) as opened:
            rows, found = opened.metadata.num_rows, opened.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        return "altered", f"{record.key}: {entry.key} is not readable as Parquet: {error}."
    if rows != expected_rows:
        return "rows", f"{record.key}: {entry.key} has {rows} rows, its record says {expected_rows}."
    if difference := _schema_difference(found, schema):
        return "schema", f"{record.key}: {entry.key} does not fit the stage's schema: {difference}."
    return None


def _schema_difference(found: pa.Schema, expected: pa.Schema) -> str:
    differences = []
    for field in expected:
        index = found.get_field_index(field.name)
        if index < 0:
            differences.append(f"column {field.name} is missing")
        elif found.field(index).type != field.type:
            differences.append(f"column {field.name} is {found.field(index).type}, expected {field.type}")
    return "; ".join(differences)


def _check_manifest(
    store: Store, manifest: Manifest, records: Mapping[PartKey, PartRecord]
) -> Iterator[Finding]:
    def fault(message: str, kind: Kind = "manifest", key: str = manifest.key) -> Finding:
        text = f"{manifest.stage} artifact {manifest.fingerprint}: {message}"
        return Finding(kind, key, text, manifest=manifest.key)

    for record in manifest.parts:
        stored = records.get(record.key)
        if stored is not None and stored != record:
            changed = [name for name in record.to_json() if getattr(record, name) != getattr(stored, name)]
            yield fault(f"{manifest.key} and {record.key.record} disagree in {', '.join(changed)}.")
    for name in ("rows", "bytes", "rejects"):
        total = sum(getattr(record, name) for record in manifest.parts)
        if getattr(manifest, name) != total:
            yield fault(f"{manifest.key} says {getattr(manifest, name)} {name}, its parts have {total}.")
    if not manifest.rejects:
        return
    key = manifest.rejects_key

    def count() -> int:
        try:
            with store.open_input(key) as file:
                return int(pq.read_metadata(file).num_rows)
        except pa.ArrowInvalid as error:
            raise DamagedError(f"{key} is not readable: {error}.") from error

    try:
        rows = again(store.files, count)
        if rows != manifest.rejects:
            yield fault(f"its rejects have {rows} rows, expected {manifest.rejects}.", "rows", key)
    except FileNotFoundError:
        yield fault(f"{key} is missing.", "missing", key)
    except DamagedError as error:
        yield fault(str(error), "altered", key)
    except OSError as error:
        yield fault(f"{key} is not readable: {error}.", "altered", key)


def _check_references(store: Store, manifest: Manifest, tables: Mapping[str, Table]) -> Iterator[Finding]:
    """Find rows whose key is not in a parent's table, over the key columns that both have."""
    import polars as pl

    own = tables.get(manifest.stage, Table()).schema
    for stage, artifact in manifest.parents.items():
        required = tables.get(stage, Table())
        columns = [
            name
            for name in required.key
            if name in own.names and own.field(name).type == required.schema.field(name).type
        ]
        try:
            parent = store.manifest(stage, artifact)
        except DamagedError:
            continue  # reported by `_all_manifests`
        if parent is None or not columns or not parent.parts or not manifest.parts:
            continue
        try:
            rows, parents = (store.scan(each.parts).select(columns) for each in (manifest, parent))
            orphans = rows.join(parents, on=columns, how="anti").unique().head(1).collect()
        except (pl.exceptions.PolarsError, DamagedError):
            continue  # reported by `_check_part`
        if orphans.height:
            message = (
                f"{manifest.stage} artifact {manifest.fingerprint} has the row {orphans.row(0, named=True)}, "
                f"which its parent {stage} {artifact} does not have."
            )
            yield Finding("reference", manifest.key, message, manifest=manifest.key)
