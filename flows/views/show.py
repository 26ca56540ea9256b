"""`qrpo ls` and `qrpo show`: runs, artifacts and what made them."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Column, Table

from flows.views.runs import RunArtifacts, part_urls, run_name, size_text
from storage import Store, StoreError

_RIGHT = [Column(name, justify="right") for name in ("rows", "rejects", "parts", "size")]


def list_runs(store: Store) -> dict[str, Any]:
    """Every run with its artifacts: fingerprint, rows, bytes, rejects and parts by stage."""
    runs: dict[str, Any] = {}
    for name in sorted(store.runs()):
        try:
            run = RunArtifacts(store, name)
            manifests = run.manifests
        except (
            StoreError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # one bad file hides no other run
            runs[name] = {"updated": None, "stages": {}, "damaged": str(error) or type(error).__name__}
            continue
        stages = {
            stage: {key: getattr(manifest, key) for key in ("fingerprint", "rows", "bytes", "rejects")}
            | {"parts": len(manifest.parts)}
            for stage, manifest in manifests.items()
        }
        runs[name] = {"updated": run.noted.get("updated"), "stages": stages}
    return {"store": store.url, "runs": runs}


def runs_table(listing: dict[str, Any]) -> Table | str:
    """The listing for a terminal, one line per run."""
    if not listing["runs"]:
        return f"no runs in {listing['store']} yet; `qrpo run CONFIG` or `qrpo demo` makes one"
    table = Table(title=listing["store"], title_justify="left", box=SIMPLE)
    table.add_column("run", overflow="fold")
    for name in ("last stage", "prompts", "rejects", "size", "updated"):
        table.add_column(
            name, no_wrap=True, justify="right" if name in ("prompts", "rejects", "size") else "left"
        )
    for name, run in listing["runs"].items():
        stages = run["stages"]
        rejects = f"{sum(entry['rejects'] for entry in stages.values()):,}"
        size = size_text(sum(entry["bytes"] for entry in stages.values()))
        last = "damaged" if "damaged" in run else next(reversed(stages), "")
        prompts = f"{stages['prompts']['rows']:,}" if "prompts" in stages else ""
        table.add_row(name, last, prompts, rejects, size, (run["updated"] or "")[:16].replace("T", " "))
    return table


def stages_table(listing: dict[str, Any]) -> Group | str:
    """The listing for a terminal, one line per stage."""
    if not listing["runs"]:
        return runs_table(listing)  # type: ignore[return-value]
    tables = []
    for name, run in listing["runs"].items():
        table = Table("stage", *_RIGHT, "fingerprint", title=f"run {name}", title_justify="left", box=SIMPLE)
        for stage, entry in run["stages"].items():
            counts = (f"{entry[key]:,}" for key in ("rows", "rejects", "parts"))
            table.add_row(stage, *counts, size_text(entry["bytes"]), entry["fingerprint"][:12])
        tables.append(f"run {name}: damaged: {run['damaged']}" if "damaged" in run else table)
    return Group(listing["store"], *tables)


def describe(store: Store, name: str, stage: str) -> dict[str, Any]:
    """One artifact: `stage`, `fingerprint`, `rows`, `rejects`, `parts` (URLs), and everything that
    made it."""
    run = RunArtifacts(store, run_name(name))
    manifest = run.manifest(stage)
    keys = ("fingerprint", "rows", "rejects", "bytes", "code_version", "created", "seconds")
    return {
        "run": run.run,
        "stage": stage,
        **{key: getattr(manifest, key) for key in keys},
        **{key: dict(getattr(manifest, key)) for key in ("config", "inputs", "metadata")},
        "parts": [url for part in manifest.parts for url in part_urls(store, part)],
        "rejects_file": store.url_of(manifest.rejects_key) if manifest.rejects else None,
        "lineage": run.lineage(manifest),
    }


def artifact_table(described: dict[str, Any]) -> Table:
    """The description for a terminal."""
    title = f"{described['stage']} of run {described['run']}"
    table = Table(show_header=False, title=title, title_justify="left")
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
    more = len(described["parts"]) - 20
    table.add_row("parts", "\n".join(described["parts"][:20] + [f"... and {more} more"] * (more > 0)))
    return table
