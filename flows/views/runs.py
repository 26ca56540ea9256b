"""Runs and their artifacts as every view reads them: names, manifests, lineage, and small text
helpers."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qrpo.errors import ConfigError, DataError
from storage import Manifest, PartRecord, Store
from storage.artifact import named_artifacts, run_versions
from tasks.stages import STAGE_NAMES


class RunArtifacts:
    """The artifacts of one run. Each manifest is read once. Raises ConfigError if the store has no
    such run."""

    def __init__(self, store: Store, run: str) -> None:
        noted = store.run(run)
        if noted is None:
            runs = ", ".join(sorted(store.runs())) or "none yet"
            raise ConfigError(f"no run named {run!r} in {store.url}; its runs: {runs}")
        self.store, self.run, self.noted = store, run, noted
        entries = noted.get("stages", {})
        self.stages: dict[str, Any] = {stage: entries[stage] for stage in STAGE_NAMES if stage in entries}
        self._read: dict[tuple[str, str], Manifest | None] = {}

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """Stage -> manifest in the order of the pipeline, without artifacts that were collected."""
        found = {stage: self.artifact(stage, entry["fingerprint"]) for stage, entry in self.stages.items()}
        return {stage: manifest for stage, manifest in found.items() if manifest is not None}

    def artifact(self, stage: str, fingerprint: str) -> Manifest | None:
        """The manifest of any artifact of the store."""
        if (stage, fingerprint) not in self._read:
            self._read[stage, fingerprint] = self.store.manifest(stage, fingerprint)
        return self._read[stage, fingerprint]

    def manifest(self, stage: str) -> Manifest:
        """The manifest of a stage. Raises DataError if the run has not produced it."""
        entry = self.stages.get(stage)
        manifest = self.artifact(stage, entry["fingerprint"]) if entry else None
        if manifest is None:
            former = any(stage in named_artifacts(version) for version in run_versions(self.noted)[1:])
            other = f". Another configuration of this run made one: run that again to see its {stage}"
            raise DataError(
                f"run {self.run!r} has no {stage} yet; its stages: {', '.join(self.stages) or 'none'}. "
                f"`qrpo run CONFIG --until {stage}` makes it{other if former else ''}"
            )
        return manifest

    def lineage(self, manifest: Manifest) -> list[dict[str, Any]]:
        """Every artifact that this one was made from, nearest first, each with its `inputs` from
        outside."""
        steps: dict[str, dict[str, Any]] = {}
        todo = list(manifest.parents.items())
        while todo:
            stage, fingerprint = todo.pop(0)
            if fingerprint not in steps:
                parent = self.artifact(stage, fingerprint)
                inputs = dict(parent.inputs) if parent else None
                steps[fingerprint] = {"stage": stage, "fingerprint": fingerprint, "inputs": inputs}
                todo += parent.parents.items() if parent else ()
        return list(steps.values())


def find_manifest(store: Store, run: str, stage: str) -> Manifest:
    """The manifest of a run's stage. Raises ConfigError or DataError if there is none."""
    return RunArtifacts(store, run).manifest(stage)


def run_name(name: str) -> str:
    """The name of a run, or the run that a configuration file names."""
    if name.endswith((".yaml", ".yml")):
        from tasks.config import load_config

        return load_config(Path(name)).name
    return name


def part_urls(store: Store, part: PartRecord) -> list[str]:
    """URLs of a part's Parquet file, or of every file of a model folder."""
    return [store.url_of(part.table.key)] if part.table else [store.url_of(file.key) for file in part.payload]


def model_url(store: Store, fingerprint: str) -> str | None:
    """The URL of a policy's model folder; None for a policy without a part."""
    manifest = store.manifest("policy", fingerprint)
    urls = [url for part in (manifest.parts if manifest else ()) for url in part_urls(store, part)]
    folders = [url.removesuffix("/config.json") for url in urls if url.endswith("/config.json")]
    return min(folders, key=len, default=None)  # those of checkpoints are below it


def export_model(store: Store, run: str, folder: Path) -> dict[str, Any]:
    """Copy the model of a run's policy into a new folder; returns what `--json` prints."""
    if folder.exists():
        raise ConfigError(f"{folder} exists: name a new folder")
    (policy,) = find_manifest(store, run, "policy").parts
    shutil.copytree(store.fetch_folder(policy), folder, ignore=shutil.ignore_patterns("checkpoints"))
    return {"run": run, "folder": str(folder)}


def size_text(size: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """Nested settings as dotted key -> JSON text."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
        items = enumerate(value)
    if not items:
        return {path: json.dumps(value, ensure_ascii=False, default=str)} if path else {}
    return {
        key: text
        for name, item in items
        for key, text in flatten(item, f"{path}.{name}" if path else str(name)).items()
    }
