"""The stages in their order, and the plan of all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qrpo.errors import ConfigError
from storage import PartRecord, Store, Table
from tasks.plan import StagePlan
from tasks.stages import completions, evaluation, policy, prompts, quantiles, reference, rewards, shards

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["STAGES", "TABLES", "Stage", "plan_pipeline", "require_parents"]

Planner = Callable[["PipelineConfig", Mapping[str, StagePlan], Store], StagePlan]


@dataclass(frozen=True)
class Stage:
    """One stage: how it is planned, what one of its rows is, and from which stages its parts are made."""

    name: str
    plan: Planner
    unit: str
    parents: tuple[str, ...]


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("prompts", prompts.plan, "prompts", ()),
        Stage("reference", reference.plan, "examples", ("prompts",)),
        Stage("completions", completions.plan, "completions", ("prompts", "reference")),
        Stage("rewards", rewards.plan, "completions", ("completions",)),
        Stage("quantiles", quantiles.plan, "prompts", ("rewards",)),
        Stage("shards", shards.plan, "prompts", ("quantiles",)),
        Stage("policy", policy.plan, "prompts", ("shards",)),
        Stage("evaluation", evaluation.plan, "completions", ("quantiles", "policy")),
    )
}
"""All stages, in the order in which a run goes through them."""

TABLES: dict[str, Table] = {
    "prompts": prompts.TABLE,
    "completions": completions.TABLE,
    "rewards": rewards.TABLE,
    "quantiles": quantiles.TABLE,
    "shards": shards.TABLE,
    "evaluation": evaluation.TABLE,
}
"""Stage -> what its parts must satisfy. The other stages commit folders."""


def plan_pipeline(
    config: "PipelineConfig", store: Store, until: str = "evaluation", *, read_source: bool = False
) -> dict[str, StagePlan]:
    """The plans of all stages up to `until`, with what the store has of each.

    Where the prompts have not been read yet, their plan and all that follow are not `known`; `read_source` then reads and cuts the
    source in memory, without writing anything.
    """
    plans: dict[str, StagePlan] = {}
    digests: dict[str, str] = {}
    for stage in STAGES.values():
        plan = stage.plan(config, plans, store)
        if stage.name == "prompts" and not plan.known and read_source:
            parts = tuple(part.plan() for part in prompts.cut(config.prompts, config.run.part_size))
            plan = replace(plan, parts=parts, known=True)
        if not plans.get("prompts", plan).known:
            plan = replace(plan, known=False)
        plan = plan.with_records(store, digests)
        digests |= _digests(plan.records)
        plans[stage.name] = plan
        if stage.name == until:
            break
    return plans


def require_parents(stage: str, plans: dict[str, StagePlan]) -> None:
    """Raise ConfigError where a stage that `stage` is made from has parts missing."""
    for parent in STAGES[stage].parents:
        plan = plans[parent]
        if not plan.complete:
            lacking = (
                f"{len(plan.missing)} of {len(plan.parts)} parts are missing"
                if plan.known
                else "it has not run yet"
            )
            raise ConfigError(
                f"{stage}: its parent stage {parent} is not complete: {lacking}. "
                f"Run it first: `qrpo run CONFIG --until {parent}`"
            )


def _digests(records: Mapping[str, PartRecord]) -> dict[str, str]:
    return {fingerprint: record.digest for fingerprint, record in records.items()}
