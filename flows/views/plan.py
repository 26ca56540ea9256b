"""`qrpo plan`: what a run would compute, what is cached, and why."""

from typing import Any

from rich.table import Table

from storage import Manifest, Store
from tasks.config import PipelineConfig
from tasks.plan import StagePlan, changed_settings
from tasks.stages import STAGES, plan_pipeline

__all__ = ["preview", "preview_table"]


def preview(config: PipelineConfig, store: Store) -> dict[str, Any]:
    """For every stage `parts_total` and `parts_cached` (null while the prompts are unknown) and `reasons` in words.

    Reads the source where it is a file, so that appended or removed prompts are seen; a hub dataset is not downloaded.
    """
    plans = plan_pipeline(config, store, read_source=not config.prompts.source.startswith("hf://"))
    noted = store.run(config.name) or {}
    stages = {}
    for name, plan in plans.items():
        previous = noted.get("stages", {}).get(name)
        manifest = store.manifest(name, previous["fingerprint"]) if previous else None
        stages[name] = {
            "parts_total": len(plan.parts) if plan.known else None,
            "parts_cached": len(plan.records) if plan.known else None,
            "reasons": _reasons(plan, plans, manifest, noted.get("config", {}), config, store),
        }
    return {"run": config.name, "store": store.url, "stages": stages}


def preview_table(preview: dict[str, Any]) -> Table:
    """The preview as a person reads it."""
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
            table.add_row(name, work, str(stage["parts_cached"]), "; ".join(stage["reasons"]))
    return table


def _reasons(
    plan: StagePlan,
    plans: dict[str, StagePlan],
    previous: Manifest | None,
    noted_config: dict[str, Any],
    config: PipelineConfig,
    store: Store,
) -> list[str]:
    if not plan.known:
        return [
            f"{config.prompts.source} has not been read yet"
            if plan.stage == "prompts"
            else "the prompts are not known yet"
        ]
    if plan.complete:
        return [] if plan.parts else [_why_empty(plan, config)]
    words = [f"{plan.stage}.{change}" for change in changed_settings(plan, previous)]
    if previous is not None and previous.family != plan.family and not words:
        words.append(f"the version of the {plan.stage} stage's code changed")
    if plan.stage == "completions":
        before, now = noted_config.get("completions", {}).get("num_ref"), config.completions.num_ref
        if before is not None and before != now:
            words.append(
                f"completions.num_ref changed from {before} to {now}: samples that are there are reused"
            )
    if plan.stage == "prompts" and previous is not None:
        words.append("the source or how it is read changed: only parts with other prompts are new")
    for parent in STAGES[plan.stage].parents:
        if not plans[parent].complete:
            words.append(f"{parent} is computed anew")
        elif (
            previous is not None
            and parent in previous.parents
            and previous.parents[parent] != plans[parent].fingerprint
        ):
            words.append(f"{parent} changed")
    if store.find_parts([part.key for part in plan.missing]):
        words.append("its parents hold other bytes now than when it was computed")
    if not words:
        words.append("never computed" if previous is None else "not finished, or removed from the store")
    return words


def _why_empty(plan: StagePlan, config: PipelineConfig) -> str:
    if plan.stage == "reference":
        return "reference.sft is null: the model is taken as it is"
    if plan.stage == "evaluation":
        return "no prompt is held out: set prompts.eval_fraction or prompts.eval_source"
    return "no prompt reaches this stage"
