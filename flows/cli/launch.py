"""Start a run from the command line, and tell how it ended."""

import os
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.evaluate import evaluation_table
from flows.service.logs import log_file, logging_to
from flows.service.server import start_server
from storage import Store
from tasks.config import PipelineConfig
from tasks.planner import Planner, planning
from tasks.rounds import rounds_until
from tasks.run_stage import run_stage
from tasks.stages import STAGE_NAMES

__all__ = ["launch", "print_summary"]


def launch(
    config: PipelineConfig,
    store_url: str,
    *,
    first: str,
    last: str,
    force: tuple[str, ...] = (),
    console: Console,
) -> dict[str, Any]:
    """Run the stages from `first` to `last`: through Prefect where anything is left to compute, else straight from the store.

    Returns the summary that `--json` prints: `run`, `store`, `stages`, `seconds` and, where it ran, `evaluation`. Where there are
    several rounds, it is the last one's, and `rounds` holds those of all.
    """
    summaries = [
        _launch(of_round, store_url, first if number == 0 else "prompts", last, force, console)
        for number, of_round in enumerate(rounds_until(last, config))
    ]
    return summaries[-1] if len(summaries) == 1 else {**summaries[-1], "rounds": summaries}


def _launch(
    config: PipelineConfig, store_url: str, first: str, last: str, force: tuple[str, ...], console: Console
) -> dict[str, Any]:
    started = time.monotonic()
    store = Store(store_url)
    planner = Planner(config, store)
    planner.require_parents(first)  # before a server is started
    results = _from_cache(planner, first, last) if not force else None
    if results is None:
        if "PREFECT_API_URL" not in os.environ:
            console.print(
                "starting a Prefect server for this run (set PREFECT_API_URL to use one that runs) ..."
            )
        server_answers = start_server()
        from flows.algorithm import pipeline

        server_answers()
        results = _through_prefect(planner, first, last, force, pipeline, console)
    stages = {
        result.stage: {
            "fingerprint": result.fingerprint,
            "rows": result.rows,
            "rejects": result.rejects,
            "seconds": result.seconds,
            "parts_computed": result.parts_computed,
            "parts_cached": result.parts_cached,
        }
        for result in results
    }
    summary: dict[str, Any] = {"run": config.name, "store": store.url, "stages": stages}
    summary["seconds"] = round(time.monotonic() - started, 3)
    if results and results[-1].stage == "evaluation":
        manifest = store.manifest("evaluation", results[-1].fingerprint)
        if manifest is not None and "summary" in manifest.metadata:
            summary["evaluation"] = manifest.metadata["summary"]
    return summary


def _through_prefect(
    planner: Planner,
    first: str,
    last: str,
    force: tuple[str, ...],
    pipeline: Any,
    console: Console,
) -> Any:
    """Run the flow; Ctrl-C, or a click on Cancel in the UI, ends it as cancelled."""
    from prefect.logging.configuration import setup_logging

    from flows.service.interrupts import CancellableRun

    setup_logging()
    run = CancellableRun()
    config, store = planner.config, planner.store
    with logging_to(log_file(store, config.name), console), planning(planner):
        try:
            return pipeline.with_options(on_running=[run.started])(config, store.url, first, last, force)
        except KeyboardInterrupt:
            run.interrupted()
            raise
        finally:
            run.over()


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The summary as a person reads it."""
    for earlier in summary.get("rounds", [])[:-1]:
        if "evaluation" in earlier:
            console.print(f"run {earlier['run']}")
            console.print(evaluation_table(earlier["evaluation"], brief=True))
    table = Table(
        "stage", "rows", "rejects", "parts", "seconds", title=f"run {summary['run']}", title_justify="left"
    )
    for name, stage in summary["stages"].items():
        computed, cached = stage["parts_computed"], stage["parts_cached"]
        parts = (
            f"{computed} computed, {cached} cached"
            if computed and cached
            else f"{computed} computed"
            if computed
            else "cached"
        )
        if not computed and not cached:
            parts = "nothing to do"
        table.add_row(name, f"{stage['rows']:,}", f"{stage['rejects']:,}", parts, f"{stage['seconds']:.1f}")
    console.print(table)
    if "evaluation" in summary:
        console.print(evaluation_table(summary["evaluation"], brief=True))
    run = summary["run"]
    store = summary["store"]
    console.print(f"\nartifacts: {store}   look at them:")
    option = "" if store == str(_default_store()) else f" --store {store}"
    stages = [name for name, stage in summary["stages"].items() if stage["rows"]] or list(summary["stages"])
    looks = [f"qrpo inspect {run} {stage}" for stage in ("rewards", "evaluation") if stage in stages]
    for command in (f"qrpo show {run} {stages[-1]}", *looks, "qrpo ls"):
        console.print(f"  {command}{option}")


def _default_store() -> str:
    return Store("artifacts").url


def _from_cache(planner: Planner, first: str, last: str) -> list[Any] | None:
    """The results of a run that has nothing to compute, without a Prefect server; None where there is work."""
    span = STAGE_NAMES[STAGE_NAMES.index(first) : STAGE_NAMES.index(last) + 1]
    if not all(planner.plan(name).complete for name in span):
        return None
    return [run_stage(name, planner.config, planner.store.url, planner=planner) for name in span]
