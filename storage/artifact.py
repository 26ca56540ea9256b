"""Artifacts of runs, for notebooks: `storage.open("artifacts", "my-run", "rewards").lazy`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from storage.errors import StoreError
from storage.manifest import Manifest
from storage.store import Store
from storage.table import REJECTS

if TYPE_CHECKING:
    import polars as pl
    import pyarrow.dataset as ds


@dataclass(frozen=True)
class Artifact:
    """The result of one stage in one run."""

    store: Store
    manifest: Manifest

    @property
    def lazy(self) -> "pl.LazyFrame":
        """All rows as a polars LazyFrame."""
        return self.store.scan(self.manifest.parts)

    @property
    def dataset(self) -> "ds.Dataset":
        """All rows as a pyarrow Dataset."""
        return self.store.dataset(self.manifest.parts)

    @cached_property
    def rejects(self) -> pa.Table:
        """The rejected rows, with reasons."""
        tables = [self.store.read_rejects(part) for part in self.manifest.parts if part.rejects]
        return pa.concat_tables(tables) if tables else REJECTS.empty_table()

    @property
    def folder(self) -> Path:
        """The files of a folder artifact (a model) in a local folder."""
        return self.store.fetch_folder(self.manifest.parts[0])


def open_artifact(store: Store | str | Path, run: str, stage: str) -> Artifact:
    """The artifact of a stage in a run; raises StoreError with the existing runs or stages."""
    store = store if isinstance(store, Store) else Store(store)
    noted = store.run(run)
    if noted is None:
        raise StoreError(f"{store.url} has no run {run!r}; it has {', '.join(store.runs()) or 'none'}.")
    stages = named_artifacts(noted)
    if stage not in stages:
        raise StoreError(f"run {run!r} has no stage {stage!r}; it has {', '.join(stages) or 'none'}.")
    artifact = stages[stage]
    manifest = store.manifest(stage, artifact)
    if manifest is None:
        raise StoreError(
            f"run {run!r} names {stage} {artifact}, which is not complete or was removed by gc. Run it again."
        )
    return Artifact(store, manifest)


def named_artifacts(run: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> artifact fingerprint, from the "stages" of a run (texts, or objects with one)."""
    noted = run.get("stages")
    pairs = noted.items() if isinstance(noted, Mapping) else ()
    named = {
        stage: value.get("fingerprint") if isinstance(value, Mapping) else value for stage, value in pairs
    }
    return {stage: artifact for stage, artifact in named.items() if isinstance(artifact, str)}


def run_versions(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The versions of a run's note, newest first: what each configuration that had its name
    produced."""
    history: Sequence[Mapping[str, Any]] = run.get("history", ())
    return [{key: value for key, value in run.items() if key not in ("name", "history")}, *history]


def unfinished_families(run: Mapping[str, Any]) -> set[str]:
    """The families that a run notes for the stages it began and did not finish."""
    return {family for families in run.get("families", {}).values() for family in families}


def artifact_summary(store: Store, manifest: Manifest) -> dict[str, Any]:
    """What commands print about an artifact: fingerprint, rows, rejects, sizes, part URLs."""
    return {
        "stage": manifest.stage,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "rejects": manifest.rejects,
        "parts": [store.url_of(file.key) for part in manifest.parts for file in part.payload],
        "rejects_url": store.url_of(manifest.rejects_key) if manifest.rejects else None,
        "parents": dict(manifest.parents),
        "inputs": dict(manifest.inputs),
        "created": manifest.created,
        "code_version": manifest.code_version,
        "seconds": manifest.seconds,
    }
