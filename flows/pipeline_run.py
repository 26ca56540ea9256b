"""Run a span of stages from the command line, and print the summary."""

import logging
import time
from contextlib import suppress
from importlib import import_module
from typing import Any

from rich.console import Group
from rich.table import Table

from flows.environment import require_memory
from flows.service.logs import log_path, logging_to
from flows.service.server import server_is_named, start_server
from flows.views.results import evaluation_table
from flows.views.runs import model_url
from qrpo.errors import EngineError
from storage import Store
from tasks.config import PipelineConfig
from tasks.plan import StagePlan
from tasks.planner import Planner, planner_of, planning
from tasks.preflight import require_preflight
from tasks.rounds import rounds_until
from tasks.run_stage import run_stage
from tasks.stages import STAGE_NAMES

log = logging.getLogger("qrpo")


def run_pipeline(
    config: PipelineConfig,
    store: Store,
    *,
    first: str = STAGE_NAMES[0],
    last: str = STAGE_NAMES[-1],
    force: tuple[str, ...] = (),
    prompts: StagePlan | None = None,
) -> dict[str, Any]:
    """Run the stages from `first` to `last`: as a Prefect flow if anything is left to compute,
    otherwise straight from the store.

    Returns the object that `--json` prints: `run`, `store`, `stages`, `seconds` and, if it ran,
    `evaluation`. With several rounds these are the last round's, and `rounds` holds one object per
    round. `prompts` is a plan of prompts to keep to.
    """
    start, *later = rounds_until(last, config)
    planner = Planner(start, store, prompts) if prompts else planner_of(start, store.url, first)
    rounds = [_run_round(planner, first, last, force)]
    for of_round in later:
        planner = planner.following(of_round)
        rounds.append(_run_round(planner, STAGE_NAMES[0], last, force))
    return rounds[-1] if len(rounds) == 1 else {**rounds[-1], "rounds": rounds}


def _run_round(planner: Planner, first: str, last: str, force: tuple[str, ...]) -> dict[str, Any]:
    started = time.monotonic()
    config, store = planner.config, planner.store
    span = STAGE_NAMES[STAGE_NAMES.index(first) : STAGE_NAMES.index(last) + 1]
    require_preflight(planner, span)  # before a server is started
    planner.require_parents(first)
    if not force and all(planner.plan(stage).complete for stage in span):
        results = [run_stage(stage, config, store.url, planner=planner) for stage in span]
    else:
        with planning(planner):
            results = run_flow("flows.algorithm", "pipeline", config, store, first, last, force)
    stages = {
        result.stage: {key: value for key, value in vars(result).items() if key != "stage"}
        for result in results
    }
    summary: dict[str, Any] = {"run": config.name, "store": store.url, "stages": stages}
    summary["seconds"] = round(time.monotonic() - started, 3)
    if "policy" in stages:
        summary["model"] = model_url(store, stages["policy"]["fingerprint"])
    manifest = store.manifest(last, stages[last]["fingerprint"])
    if last == "evaluation" and manifest is not None and "summary" in manifest.metadata:
        summary["evaluation"] = manifest.metadata["summary"]
    return summary


def run_flow(module: str, name: str, config: PipelineConfig, store: Store, *arguments: Any) -> Any:
    """Run the flow `name` of a module for the command line: with a server, a log file, and an end
    on Ctrl-C or Cancel in the UI."""
    require_memory()
    if not server_is_named():
        log.info("starting a Prefect server for this run (set PREFECT_API_URL to use a running server) ...")
    wait_for_server = start_server()
    from prefect.logging.configuration import setup_logging

    from flows.service.flow_runs import call_flow, cancellable_run

    flow = getattr(import_module(module), name)
    with suppress(EngineError):  # `call_flow` says that it does not answer
        wait_for_server()
    setup_logging()
    with logging_to(log_path(store, f"{config.name}/run.log")), cancellable_run() as on_running:
        return call_flow(flow.with_options(on_running=[on_running]), config, store.url, *arguments)


def summary_view(summary: dict[str, Any]) -> Group:
    """The summary as tables, and commands that show the artifacts."""
    parts: list[Any] = []
    for earlier in summary.get("rounds", [])[:-1]:
        if "evaluation" in earlier:
            parts += [f"run {earlier['run']}", evaluation_table(earlier["evaluation"], brief=True)]
    run, stages = summary["run"], summary["stages"]
    table = Table("stage", "rows", "rejects", "parts", "seconds", title=f"run {run}", title_justify="left")
    for name, stage in stages.items():
        counts = [f"{stage[f'parts_{how}']} {how}" for how in ("computed", "cached") if stage[f"parts_{how}"]]
        cached = ["cached"] if stage["parts_cached"] else ["nothing to do"]
        shown = ", ".join(counts if stage["parts_computed"] else cached)
        table.add_row(name, f"{stage['rows']:,}", f"{stage['rejects']:,}", shown, f"{stage['seconds']:.1f}")
    parts.append(table)
    if "evaluation" in summary:
        parts.append(evaluation_table(summary["evaluation"], brief=True))
    option = "" if summary["store"] == Store("artifacts").url else f" --store {summary['store']}"
    with_rows = [name for name, stage in stages.items() if stage["rows"]] or list(stages)
    commands = [f"show {run} {with_rows[-1]}"]
    commands += [f"inspect {run} {stage}" for stage in ("rewards", "evaluation") if stage in with_rows]
    lines = [f"  qrpo {command}{option}" for command in (*commands, "ls")]
    if model := summary.get("model"):
        folder = model if "://" not in model else f"{run}-model"
        lines += ["", f"model: {model}   use it:"]
        lines += [f"  qrpo export {run} {folder}{option}"] * (folder != model)
        lines += [
            f"  vllm serve {folder}",
            "  from transformers import pipeline",
            f"  generate = pipeline('text-generation', {folder!r})",
            "  generate([{'role': 'user', 'content': 'Hello'}], max_new_tokens=64)",
        ]
    return Group(*parts, f"\nartifacts: {summary['store']}   look at them:", *lines)
