"""`qrpo verify` and `qrpo gc`: check the store's files, and remove what no run references."""

from typing import Any

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


def verify_store(store: Store) -> list[Finding]:
    """Every fault in the store, with a progress bar (log lines without a terminal)."""
    with reporting("verify", 0, in_prefect=False) as reporter:
        progress = lambda done, total: reporter.update(done, "parts", total=total)  # noqa: E731
        return list(verify(store, tables=TABLES, progress=progress))


def check_store(store: Store, *, repairing: bool, trust: bool = False) -> dict[str, Any]:
    """The findings. `repairing`: drop what they name, and run the runs that need it again; `trust`:
    also those whose configuration in the store runs code."""
    findings = verify_store(store)
    result: dict[str, Any] = {
        "store": store.url,
        "findings": [{"kind": f.kind, "key": f.key, "message": f.message} for f in findings],
    }
    if repairing and findings:
        result["dropped"] = repair(store, findings)
        result["runs"], failed = rerun(store, trust)
        result["left"] = failed + [str(finding) for finding in verify_store(store)]
    return result


def findings_text(checked: dict[str, Any]) -> str:
    """The findings as lines."""
    lines = [f"{finding['kind']}: {finding['message']}" for finding in checked["findings"]]
    lines += [f"left: {line}" for line in checked.get("left", ())]
    repaired = f", {len(checked['dropped'])} repaired" if "dropped" in checked else ""
    return "\n".join([*lines, f"{len(checked['findings'])} faults in {checked['store']}{repaired}"])


def rerun(store: Store, trust: bool) -> tuple[list[str], list[str]]:
    """Run every named run again up to its last stage: only what is missing is computed.

    Returns the runs' names, and why others could not be run.
    """
    names, failed = [], []
    for name in store.runs():
        noted = store.run(name) or {}
        stages = [stage for stage in STAGES if stage in noted.get("stages", {})]
        if not stages:
            continue
        try:
            config = parse_config(noted.get("config", {}), where=f"runs/{name}.json")
            require_trust(config, f"runs/{name}.json", trust)
            run_pipeline(config, store, last=stages[-1], prompts=noted_prompts(config, store))
            names.append(name)
        except (QRPOError, StoreError) as error:
            failed.append(f"run {name}: {error}")
    return names, failed


def clean_store(store: Store, *, remove: bool, **rules: Any) -> GcPlan:
    """What the rules of `plan_gc` would remove. `remove`: remove it. With a progress bar, like
    `verify_store`."""
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
    sizes = {name: getattr(plan, name) for name in ("bytes", "unfinished_bytes", "kept_bytes")}
    return {**lists, "unfinished": [part.record for part in plan.unfinished], **sizes}


def gc_text(plan: GcPlan, *, done: bool) -> str:
    """The plan as lines."""
    verb = "removed" if done else "would be removed (add --yes to remove)"
    counts = f"{len(plan.parts)} parts and {len(plan.manifests)} manifests, {size_text(plan.bytes)}"
    unfinished = set(plan.unfinished)
    lines = [f"{counts}, {verb}; {size_text(plan.kept_bytes)} stay"]
    lines += [f"  run {name}" for name in plan.drop_runs]
    lines += [f"  {part}" for part in plan.parts if part not in unfinished]
    if plan.unfinished:
        verb = verb if unfinished <= set(plan.parts) else "kept (add --unfinished to remove)"
        size = size_text(plan.unfinished_bytes)
        lines += [f"{len(plan.unfinished)} parts of unfinished stages, {size}, {verb}"]
        lines += [f"  {part}" for part in plan.unfinished]
    return "\n".join(lines)
