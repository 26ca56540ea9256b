"""`qrpo ls` and `qrpo show`: runs, artifacts and what made them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from qrpo.errors import ConfigError, DataError
from storage import Manifest, Store
from tasks.stages import STAGE_NAMES

__all__ = ["artifact_table", "describe", "find_manifest", "lineage", "list_runs", "runs_table", "stages_of"]


def list_runs(store: Store) -> dict[str, Any]:
    """Every run with its artifacts: fingerprint, rows, bytes, rejects and parts by stage."""
    runs = {}
    for name in sorted(store.runs()):
        noted = store.run(name) or {}
        stages = {}
        for stage, entry in stages_of(noted).items():
            manifest = store.manifest(stage, entry["fingerprint"])
            if manifest is not None:
                stages[stage] = {
                    "fingerprint": manifest.fingerprint,
                    "rows": manifest.rows,
                    "bytes": manifest.bytes,
                    "rejects": manifest.rejects,
                    "parts": len(manifest.parts),
                }
        runs[name] = {"updated": noted.get("updated"), "stages": stages}
    return {"store": store.url, "runs": runs}


def stages_of(noted: Mapping[str, Any]) -> dict[str, Any]:
    """What a run noted of its stages, in the order in which a run goes through them."""
    entries = noted.get("stages", {})
    return {stage: entries[stage] for stage in STAGE_NAMES if stage in entries}


def runs_table(listing: dict[str, Any]) -> Table | str:
    """The listing as a person reads it."""
    if not listing["runs"]:
        return f"no runs in {listing['store']} yet; `qrpo run CONFIG` or `qrpo demo` makes one"
    table = Table(
        "run",
        "stage",
        "rows",
        "rejects",
        "parts",
        "size",
        "fingerprint",
        title=listing["store"],
        title_justify="left",
    )
    for name, run in listing["runs"].items():
        for number, (stage, entry) in enumerate(run["stages"].items()):
            table.add_row(
                name if number == 0 else "",
                stage,
                f"{entry['rows']:,}",
                f"{entry['rejects']:,}",
                str(entry["parts"]),
                size_text(entry["bytes"]),
                entry["fingerprint"][:12],
            )
        table.add_section()
    return table


def describe(store: Store, name: str, stage: str) -> dict[str, Any]:
    """One artifact: `stage`, `fingerprint`, `rows`, `rejects`, `parts` (URLs), and everything that made it."""
    run = run_name(name)
    manifest = find_manifest(store, run, stage)
    return {
        "run": run,
        "stage": stage,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "rejects": manifest.rejects,
        "bytes": manifest.bytes,
        "parts": [url for part in manifest.parts for url in part_urls(store, part)],
        "rejects_file": store.url_of(manifest.rejects_key) if manifest.rejects else None,
        "config": dict(manifest.config),
        "inputs": dict(manifest.inputs),
        "metadata": dict(manifest.metadata),
        "code_version": manifest.code_version,
        "created": manifest.created,
        "seconds": manifest.seconds,
        "lineage": lineage(store.manifest, manifest),
    }


def artifact_table(described: dict[str, Any]) -> Table:
    """The description as a person reads it."""
    table = Table(
        show_header=False, title=f"{described['stage']} of run {described['run']}", title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key in ("fingerprint", "rows", "rejects", "rejects_file", "created", "seconds", "code_version"):
        if described[key] is not None:
            table.add_row(key, str(described[key]))
    table.add_row("size", size_text(described["bytes"]))
    for section in ("config", "inputs"):
        for key, value in described[section].items():
            table.add_row(f"{section}.{key}", str(value))
    for step in described["lineage"]:
        table.add_row(f"from {step['stage']}", f"{step['fingerprint']}  {step['inputs'] or ''}")
    shown = described["parts"][:20]
    table.add_row(
        "parts",
        "\n".join(shown) + (f"\n... and {len(described['parts']) - 20} more" if len(shown) == 20 else ""),
    )
    return table


def run_name(name: str) -> str:
    """The run's name; a configuration file stands for the run that it names."""
    if name.endswith((".yaml", ".yml")):
        from tasks.config import load_config

        return load_config(Path(name)).name
    return name


def find_manifest(store: Store, run: str, stage: str) -> Manifest:
    """The manifest of a run's stage; ConfigError or DataError where there is no such run, or it has not come so far."""
    noted = store.run(run)
    if noted is None:
        known = ", ".join(sorted(store.runs())) or "none yet"
        raise ConfigError(f"no run named {run!r} in {store.url}; its runs: {known}")
    entry = noted.get("stages", {}).get(stage)
    manifest = store.manifest(stage, entry["fingerprint"]) if entry else None
    if manifest is None:
        done = ", ".join(stages_of(noted)) or "none"
        raise DataError(
            f"run {run!r} has no {stage} yet; stages that are there: {done}. `qrpo run CONFIG --until {stage}` makes it"
        )
    return manifest


def part_urls(store: Store, part: Any) -> list[str]:
    """Where a part's files lie: its Parquet file, or every file of a model folder."""
    return [store.url_of(part.table.key)] if part.table else [store.url_of(file.key) for file in part.payload]


def size_text(size: float) -> str:
    """Bytes in a unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def lineage(find: Callable[[str, str], Manifest | None], manifest: Manifest) -> list[dict[str, Any]]:
    """Every artifact that this one was made from, nearest first, down to the source's digest; `find` gives manifests."""
    steps: list[dict[str, Any]] = []
    todo = list(manifest.parents.items())
    while todo:
        stage, fingerprint = todo.pop(0)
        if any(step["fingerprint"] == fingerprint for step in steps):
            continue
        parent = find(stage, fingerprint)
        steps.append(
            {"stage": stage, "fingerprint": fingerprint, "inputs": dict(parent.inputs) if parent else None}
        )
        todo += list(parent.parents.items()) if parent else []
    return steps
