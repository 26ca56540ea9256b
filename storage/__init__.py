"""Artifacts: a content-keyed store of Parquet parts on any fsspec URL. Knows no models and no Prefect.

    store = storage.Store("artifacts")
    storage.open(store, "my-run", "rewards").lazy      # a polars LazyFrame of one stage's rows

Names are loaded when they are first used, so that `import storage` costs nothing.
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

_HOMES = {
    "artifact": ["Artifact", "artifact_summary"],
    "digests": ["row_digest"],
    "errors": [
        "DamagedError",
        "LeaseLostError",
        "SchemaError",
        "StoreError",
        "StoreURLError",
        "StoreUnavailableError",
        "UnsafeNameError",
    ],
    "fingerprints": ["file_digest", "fingerprint", "folder_digest"],
    "manifest": ["Manifest", "artifact_fingerprint", "manifest_of"],
    "parts": ["FileEntry", "PartKey", "PartRecord"],
    "reader": ["Row", "ShardReader"],
    "store": ["Store"],
    "table": ["REJECTS", "Table", "rejects_table"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "open":
        value = import_module("storage.artifact").open_artifact
    elif name in _HOME_OF:
        value = getattr(import_module(f"storage.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'storage' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
