"""A content-keyed store of Parquet parts on any fsspec URL. Knows no stage, model or Prefect.

    store = storage.Store("artifacts")
    storage.open(store, "my-run", "rewards").lazy      # a polars LazyFrame of one stage's rows

    store          Store: bytes by key, manifests, runs, work folders
    commit         PartWriter: how parts are written, found and discarded
    read           PartReader: how parts are read
    contents       the committed bytes of a part's files, checked by sha256
    processes      this machine, its processes, names of temporary files
    parts          PartKey and PartRecord: the unit of caching and commit
    manifest       Manifest: the parts and the provenance of one artifact
    artifact       Artifact: the result of one stage in one run, for notebooks
    table          Table: the schema, key and checks that a caller requires of a part; rejects
    checks         reusable checks on the values of a table
    reader         ShardReader: shuffled training rows from any position
    columns        ColumnBatch: rows kept as columns, for the reader
    fingerprints   fingerprints of JSON values, digests of files and folders
    digests        row_digest: an order-free digest of rows
    leases         which process works on which part
    gc             what no run needs, and its removal
    verify         faults of a store, and their repair
    files          the interface of backends, and the local folder
    remote         object stores and other fsspec file systems, with retries
    names          valid keys and names, redaction of secrets
    crashpoints    instants at which tests kill the process
    errors         StoreError and its subclasses

Names are loaded on first use, so `import storage` loads no heavy package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.artifact import Artifact, artifact_summary
    from storage.artifact import open_artifact as open  # noqa: A004
    from storage.digests import row_digest
    from storage.errors import (
        DamagedError,
        LeaseLostError,
        SchemaError,
        StoreError,
        StoreUnavailableError,
        StoreURLError,
        UnsafeNameError,
    )
    from storage.fingerprints import file_digest, fingerprint, folder_digest
    from storage.manifest import Manifest, artifact_fingerprint, manifest_of
    from storage.parts import FileEntry, PartKey, PartRecord
    from storage.reader import Row, ShardReader
    from storage.store import Store
    from storage.table import REJECTS, Table, rejects_table

__all__ = [
    "REJECTS",
    "Artifact",
    "DamagedError",
    "FileEntry",
    "LeaseLostError",
    "Manifest",
    "PartKey",
    "PartRecord",
    "Row",
    "SchemaError",
    "ShardReader",
    "Store",
    "StoreError",
    "StoreURLError",
    "StoreUnavailableError",
    "Table",
    "UnsafeNameError",
    "artifact_fingerprint",
    "artifact_summary",
    "file_digest",
    "fingerprint",
    "folder_digest",
    "manifest_of",
    "open",
    "rejects_table",
    "row_digest",
]

_NAMES = {
    "artifact": "Artifact artifact_summary open",
    "digests": "row_digest",
    "errors": "DamagedError LeaseLostError SchemaError StoreError StoreUnavailableError StoreURLError UnsafeNameError",
    "fingerprints": "file_digest fingerprint folder_digest",
    "manifest": "Manifest artifact_fingerprint manifest_of",
    "parts": "FileEntry PartKey PartRecord",
    "reader": "Row ShardReader",
    "store": "Store",
    "table": "REJECTS Table rejects_table",
}
_HOME_OF = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'storage' has no attribute {name!r}")
    module = import_module(f"storage.{_HOME_OF[name]}")
    value = module.open_artifact if name == "open" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
