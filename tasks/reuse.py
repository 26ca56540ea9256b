"""Rows that were computed before under another cut: prompts appended, removed or reordered, `num_ref` changed, parts of another size.

A part's fingerprint covers its whole slice, so a changed cut makes new parts. Their rows need not be new: every part of one family was
made with the same settings, model and code, hence a row of the family answers for its key wherever it lies. Before a stage starts,
`with_candidates` names for each missing part the committed parts that hold some of its prompts; the computation then takes the
rows whose keys match and computes only the rest.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from storage import PartKey, PartRecord, Store
from tasks.plan import PartPlan, StagePlan
from tasks.work import Work

if TYPE_CHECKING:
    import polars as pl

__all__ = ["reusable_rows", "with_candidates"]

_SALVAGED = {
    "completions",
    "rewards",
    "shards",
}  # the other stages are a folder, or quicker to compute than to look up


def with_candidates(store: Store, plan: StagePlan, missing: Sequence[PartPlan]) -> tuple[PartPlan, ...]:
    """The missing parts, each with the committed parts of its family that hold any of its prompts and samples.

    Reads one column of the family's other parts, once a stage; nothing where the family has none, or where the stage
    does not take rows over.
    """
    if plan.stage not in _SALVAGED:
        return tuple(missing)
    missing_keys = {part.key.fingerprint for part in missing}
    holders: dict[str, dict[str, list[PartRecord]]] = {}
    for family in {part.key.family for part in missing}:
        by_prompt: dict[str, list[PartRecord]] = {}
        for record in store.family_parts(plan.stage, family):
            if record.fingerprint in missing_keys:
                continue  # stale: made from other bytes of its parents, or being forced
            for prompt_id in set(store.read_part(record, columns=["prompt_id"])["prompt_id"].to_pylist()):
                by_prompt.setdefault(prompt_id, []).append(record)
        if by_prompt:
            holders[family] = by_prompt
    if not holders:
        return tuple(missing)
    return tuple(
        replace(part, reuse=_candidates(store, part, holders.get(part.key.family, {}))) for part in missing
    )


def reusable_rows(work: Work, part: PartPlan, on: Sequence[str]) -> "pl.DataFrame":
    """Rows of the candidate parts for this part's slice, unique by the columns `on`; an empty frame where there are none."""
    import polars as pl

    records = [record for record in (work.store.part(key) for key in part.reuse) if record is not None]
    if not records:
        return pl.DataFrame()
    return work.store.scan(records).unique(subset=list(on), keep="first", maintain_order=True).collect()


def _candidates(store: Store, part: PartPlan, by_prompt: dict[str, list[PartRecord]]) -> tuple[PartKey, ...]:
    prompts = next(key for key in part.inputs if key.stage == "prompts")
    record = store.part(prompts)
    assert record is not None
    found: dict[str, PartKey] = {}
    for prompt_id in store.read_part(record, columns=["prompt_id"])["prompt_id"].to_pylist():
        for holder in by_prompt.get(prompt_id, ()):
            if _overlaps(part, holder):
                found[holder.fingerprint] = PartKey(holder.stage, holder.family, holder.fingerprint)
    return tuple(found[key] for key in sorted(found))


def _overlaps(part: PartPlan, holder: PartRecord) -> bool:
    if "start" not in part.slice or "start" not in holder.metadata:
        return bool(part.slice.get("origin") == holder.metadata.get("origin"))
    return bool(
        part.slice["start"] < holder.metadata["stop"] and holder.metadata["start"] < part.slice["stop"]
    )
