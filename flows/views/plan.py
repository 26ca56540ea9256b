"""`qrpo plan`: what a run would compute, what is cached, and why."""

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qrpo.errors import ConfigError
from storage import Store
from tasks.config import PipelineConfig
from tasks.planner import Planner
from tasks.reasons import reasons
from tasks.reuse import RowCount, count_rows
from tasks.rounds import round_configs
from tasks.stages import STAGES


def preview(config: PipelineConfig, store: Store) -> dict[str, Any]:
    """For every stage `parts_total` and `parts_cached` (null while the prompts are unknown), `rows`
    and `reasons` in words.

    `rows` says what the missing parts cost: `compute` of `unit` to compute, and `reuse` of them
    taken from committed rows; null for stages whose rows cost next to nothing.

    Reads the source where it is a file, so that appended or removed prompts are seen; a hub dataset
    is not downloaded. With several rounds the values are the first round's, and `rounds` holds
    those of all.
    """
    first, *later = round_configs(config)
    rounds = [_preview(first, store), *(_preview_later(of_round, store) for of_round in later)]
    return rounds[0] if len(rounds) == 1 else {**rounds[0], "rounds": rounds}


def _preview_later(config: PipelineConfig, store: Store) -> dict[str, Any]:
    """A round after the first; nothing is known of it before the policy that it starts from is
    there."""
    try:
        return _preview(config, store)
    except ConfigError:
        why = f"the policy of {config.rounds.from_run} is not there yet"
        unknown = {"parts_total": None, "parts_cached": None, "rows": None, "reasons": [why]}
        return {"run": config.name, "store": store.url, "stages": dict.fromkeys(STAGES, unknown)}


def _preview(config: PipelineConfig, store: Store) -> dict[str, Any]:
    planner = Planner(config, store)
    noted = store.run(config.name) or {}
    stages = {}
    counts: dict[str, RowCount | None] = {}
    for name, stage in STAGES.items():
        plan = planner.plan(name, read_source=not config.prompts.source.startswith("hf://"))
        settings = stage.settings_of(config)
        count = count_rows(store, stage, settings, plan, planner.uncommitted) if plan.known else None
        counts[name] = count
        stages[name] = {
            "parts_total": len(plan.parts) if plan.known else None,
            "parts_cached": len(plan.records) if plan.known else None,
            "rows": asdict(count) if count is not None else None,
            "reasons": reasons(plan, planner, noted, counts),
        }
    return {"run": config.name, "store": store.url, "stages": stages}


def plan_view(preview: dict[str, Any]) -> Group:
    """The preview for a terminal: one table for each round, and what would stop the run."""
    problems = [Text(f"problem: {problem}", style="yellow") for problem in preview.get("problems", ())]
    return Group(*map(_round_table, preview.get("rounds", [preview])), *problems)


def _round_table(preview: dict[str, Any]) -> Table:
    table = Table(
        "stage",
        "to compute",
        "cached",
        "why",
        title=f"run {preview['run']} in {preview['store']}",
        title_justify="left",
    )
    for name, stage in preview["stages"].items():
        if stage["parts_total"] is None:
            table.add_row(name, "?", "?", "; ".join(stage["reasons"]))
        else:
            todo = stage["parts_total"] - stage["parts_cached"]
            work = f"{todo} of {stage['parts_total']} parts" if todo else "nothing"
            if stage["rows"] is not None and todo:
                rows = stage["rows"]
                work += f": {rows['compute']:,} of {rows['compute'] + rows['reuse']:,} {rows['unit']}"
            table.add_row(name, work, str(stage["parts_cached"]), "; ".join(stage["reasons"]))
    return table
