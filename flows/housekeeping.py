"""`qrpo verify` and `qrpo gc`: check the store's files, and remove what no run references."""

from typing import Any

from rich.console import Console

from flows.evaluate import require_trust
from flows.pipeline_run import run_pipeline
from flows.views.runs import size_text
from qrpo.errors import QRPOError
from storage import Store, StoreError
from storage.gc import GcPlan, collect, plan_gc
from storage.verify import Finding, repair, verify
from tasks.config import parse_config
from tasks.planner import noted_prompts
from tasks.progress import reporting
from tasks.stages import STAGES, TABLES

__all__ = ["check_store", "clean_store", "describe_gc", "print_gc"]


def verify_store(store: Store) -> list[Finding]:
    """Every fault in the store, with a progress bar (log lines without a terminal)."""
    with reporting("verify", 0, in_prefect=False) as reporter:

        def report(done: int, total: int) -> None:
            reporter.update(done, "parts", total=total)

        return list(verify(store, tables=TABLES, progress=report))


def check_store(store: Store, console: Console, *, repairing: bool, trust: bool = False) -> dict[str, Any]:
    """The findings. `repairing`: drop what they name, and run the runs that need it again; `trust`: also those whose
    configuration in the store runs code."""
    findings = verify_store(store)
    result: dict[str, Any] = {
        "store": store.url,
        "findings": [{"kind": f.kind, "key": f.key, "message": f.message} for f in findings],
    }
    if repairing and findings:
        result["dropped"] = repair(store, findings)
        result["runs"], failed = rerun(store, console, trust)
        result["left"] = failed + [str(finding) for finding in verify_store(store)]
    return result


def rerun(store: Store, console: Console, trust: bool) -> tuple[list[str], list[str]]:
    """Run every named run again up to its last stage: only what is missing is computed.

    Returns the runs' names, and why others could not be run.
    """
    order = list(STAGES)
    names, failed = [], []
    for name in store.runs():
        noted = store.run(name) or {}
        stages = [stage for stage in noted.get("stages", {}) if stage in STAGES]
        if not stages:
            continue
        try:
            config = parse_config(noted.get("config", {}), where=f"runs/{name}.json")
            require_trust(config, f"runs/{name}.json", trust)
            last = max(stages, key=order.index)
            prompts = noted_prompts(config, store)
            run_pipeline(config, store.url, last=last, prompts=prompts, console=console)
            names.append(name)
        except (QRPOError, StoreError) as error:
            failed.append(f"run {name}: {error}")
    return names, failed


def clean_store(store: Store, *, remove: bool, **rules: Any) -> GcPlan:
    """What the rules of `plan_gc` would remove. `remove`: remove it. With a progress bar, like `verify_store`."""
    with reporting("gc", 0, in_prefect=False) as reporter:
        plan = plan_gc(
            store, **rules, progress=lambda done, total: reporter.update(done, "manifests read", total=total)
        )
    if remove:
        with reporting("gc", len(plan.keys), in_prefect=False) as reporter:
            collect(store, plan, progress=lambda done, total: reporter.update(done, "removed", total=total))
    return plan


def describe_gc(plan: GcPlan) -> dict[str, Any]:
    """The plan as JSON values."""
    lists = {key: list(getattr(plan, key)) for key in ("keep_runs", "drop_runs", "keys")}
    unfinished = [part.record for part in plan.unfinished]
    sizes = {name: getattr(plan, name) for name in ("bytes", "unfinished_bytes", "kept_bytes")}
    return {**lists, "unfinished": unfinished, **sizes}


def print_gc(plan: GcPlan, console: Console, *, done: bool) -> None:
    """Print the plan."""
    counts = f"{len(plan.parts)} parts and {len(plan.manifests)} manifests, {size_text(plan.bytes)}"
    verb = "removed" if done else "would be removed (add --yes to remove)"
    console.print(f"{counts}, {verb}; {size_text(plan.kept_bytes)} stay")
    unfinished = set(plan.unfinished)
    finished = [part for part in plan.parts if part not in unfinished]
    for line in (*(f"run {name}" for name in plan.drop_runs), *finished):
        console.print(f"  {line}")
    if plan.unfinished:
        verb = verb if unfinished <= set(plan.parts) else "kept (add --unfinished to remove)"
        size = size_text(plan.unfinished_bytes)
        console.print(f"{len(plan.unfinished)} parts of unfinished stages, {size}, {verb}")
        for part in plan.unfinished:
            console.print(f"  {part}")
