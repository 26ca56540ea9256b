"""Run a span of stages from the command line, and print the summary."""

import time
from contextlib import suppress
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.environment import require_memory
from flows.evaluate import evaluation_table
from flows.service.logs import log_path, logging_to
from flows.service.server import server_is_named, start_server
from qrpo.errors import EngineError
from storage import Store
from tasks.config import PipelineConfig
from tasks.plan import StagePlan
from tasks.planner import Planner, planner_of, planning
from tasks.rounds import rounds_until
from tasks.run_stage import run_stage
from tasks.stages import STAGE_NAMES

__all__ = ["print_summary", "run_flow", "run_pipeline"]


def run_pipeline(
    config: PipelineConfig,
    store_url: str,
    *,
    first: str = STAGE_NAMES[0],
    last: str = STAGE_NAMES[-1],
    force: tuple[str, ...] = (),
    prompts: StagePlan | None = None,
    console: Console,
) -> dict[str, Any]:
    """Run the stages from `first` to `last`: as a Prefect flow if anything is left to compute, otherwise straight from the store.

    Returns the object that `--json` prints: `run`, `store`, `stages`, `seconds` and, if it ran, `evaluation`. With several rounds
    these are the last round's, and `rounds` holds one object per round. `prompts` is a plan of prompts to keep to.
    """
    start, *later = rounds_until(last, config)
    planner = Planner(start, Store(store_url), prompts) if prompts else planner_of(start, store_url, first)
    rounds = [_run_round(planner, first, last, force, console)]
    for of_round in later:
        planner = planner.following(of_round)
        rounds.append(_run_round(planner, STAGE_NAMES[0], last, force, console))
    return rounds[-1] if len(rounds) == 1 else {**rounds[-1], "rounds": rounds}


def _run_round(
    planner: Planner, first: str, last: str, force: tuple[str, ...], console: Console
) -> dict[str, Any]:
    started = time.monotonic()
    config, store = planner.config, planner.store
    planner.require_parents(first)  # before a server is started
    span = STAGE_NAMES[STAGE_NAMES.index(first) : STAGE_NAMES.index(last) + 1]
    if not force and all(planner.plan(stage).complete for stage in span):
        results = [run_stage(stage, config, store.url, planner=planner) for stage in span]
    else:
        with planning(planner):
            results = run_flow(
                "flows.algorithm", "pipeline", config, store, first, last, force, console=console
            )
    summary: dict[str, Any] = {
        "run": config.name,
        "store": store.url,
        "stages": {
            result.stage: {name: value for name, value in vars(result).items() if name != "stage"}
            for result in results
        },
        "seconds": round(time.monotonic() - started, 3),
    }
    if results and results[-1].stage == "evaluation":
        manifest = store.manifest("evaluation", results[-1].fingerprint)
        if manifest is not None and "summary" in manifest.metadata:
            summary["evaluation"] = manifest.metadata["summary"]
    return summary


def run_flow(
    module: str, name: str, config: PipelineConfig, store: Store, *arguments: Any, console: Console
) -> Any:
    """Run the flow `name` of a module for the command line: with a server, a log file, and an end on Ctrl-C or Cancel in the UI."""
    require_memory()
    if not server_is_named():
        console.print(
            "starting a Prefect server for this run (set PREFECT_API_URL to use a running server) ..."
        )
    wait_for_server = start_server()
    from prefect.logging.configuration import setup_logging

    from flows.service.flow_runs import call_flow, cancellable_run

    flow = getattr(import_module(module), name)
    with suppress(EngineError):  # `call_flow` says that it does not answer
        wait_for_server()
    setup_logging()
    with logging_to(log_path(store, f"{config.name}/run.log"), console), cancellable_run() as on_running:
        return call_flow(flow.with_options(on_running=[on_running]), config, store.url, *arguments)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the summary as tables, and commands that show the artifacts."""
    for earlier in summary.get("rounds", [])[:-1]:
        if "evaluation" in earlier:
            console.print(f"run {earlier['run']}")
            console.print(evaluation_table(earlier["evaluation"], brief=True))
    run, stages = summary["run"], summary["stages"]
    table = Table("stage", "rows", "rejects", "parts", "seconds", title=f"run {run}", title_justify="left")
    for name, stage in stages.items():
        computed, cached = stage["parts_computed"], stage["parts_cached"]
        parts = f"{computed} computed" if computed else "cached" if cached else "nothing to do"
        if computed and cached:
            parts += f", {cached} cached"
        table.add_row(name, f"{stage['rows']:,}", f"{stage['rejects']:,}", parts, f"{stage['seconds']:.1f}")
    console.print(table)
    if "evaluation" in summary:
        console.print(evaluation_table(summary["evaluation"], brief=True))
    console.print(f"\nartifacts: {summary['store']}   look at them:")
    option = "" if summary["store"] == Store("artifacts").url else f" --store {summary['store']}"
    shown = [name for name, stage in stages.items() if stage["rows"]] or list(stages)
    console.print(f"  qrpo show {run} {shown[-1]}{option}")
    for stage in ("rewards", "evaluation"):
        if stage in shown:
            console.print(f"  qrpo inspect {run} {stage}{option}")
    console.print(f"  qrpo ls{option}")
