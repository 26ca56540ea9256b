"""One stage from plan to manifest: its parts, what they came to together, and the run's note of it.

Prefect is loaded only where something is to be computed (`tasks.groups`): a run that finds everything in the store needs none.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qrpo.errors import DataError
from storage import Manifest, PartRecord, Store, manifest_of
from storage.manifest import now
from tasks.plan import StagePlan
from tasks.progress import reporting
from tasks.stages import STAGES, evaluation, plan_pipeline, prompts, require_parents
from tasks.work import Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["StageResult", "run_stage"]

log = logging.getLogger("qrpo")


@dataclass(frozen=True)
class StageResult:
    """What one stage of a run came to. Small: the artifact itself lies in the store."""

    stage: str
    fingerprint: str
    rows: int
    rejects: int
    parts_computed: int
    parts_cached: int
    seconds: float


def run_stage(
    stage: str,
    config: "PipelineConfig",
    store_url: str,
    *,
    force: bool = False,
    plans: dict[str, StagePlan] | None = None,
) -> StageResult:
    """Compute what is missing of `stage` (all of it where `force`), commit its manifest, note it in the run.

    Call it within a Prefect flow where anything is to be computed. `plans` are those of `plan_pipeline`, if they were made just
    now. Raises ConfigError where a parent stage is not complete, DataError where the stage
    loses more rows than `run.max_reject_fraction`; every part that was committed stays.
    """
    started = time.monotonic()
    store = Store(store_url)
    plans = plans or plan_pipeline(config, store, until=stage)
    plan = plans[stage]
    require_parents(stage, plans)
    if stage == "prompts":
        plan, computed = _read_prompts(plan, config, store, force)
    else:
        computed = 0
        if force or plan.missing:
            from tasks.groups import compute_missing

            computed = compute_missing(plan, config, store, force)
            # anew, even where nothing was computed here: another run may have done it all
            plan = plan_pipeline(config, store, until=stage)[stage]
        assert plan.complete, f"{stage}: {len(plan.missing)} parts are missing after they were computed"
    manifest = _commit_manifest(plan, config, store, time.monotonic() - started)
    result = StageResult(
        stage,
        plan.fingerprint,
        manifest.rows,
        manifest.rejects,
        computed,
        len(plan.parts) - computed,
        round(time.monotonic() - started, 3),
    )
    _note_run(config, store, result)
    log.info("%s", _line(result))
    _check_rejects(manifest, config, store)
    return result


def _line(result: StageResult) -> str:
    counts = [f"{result.parts_computed} computed"] if result.parts_computed else []
    counts += [f"{result.parts_cached} cached"] if result.parts_cached else []
    parts = ", ".join(counts) or "nothing to do"
    return f"{result.stage:<12} {parts}; {result.rows:,} rows, {result.seconds:.1f} s"


def _read_prompts(
    plan: StagePlan, config: "PipelineConfig", store: Store, force: bool
) -> tuple[StagePlan, int]:
    if plan.known and plan.complete and not force:
        return plan, 0
    parts, records, computed = [], {}, 0
    with reporting("prompts", 0) as reporter:
        for part, record, new in prompts.compute(Work("prompts", config, store.url, ())):
            parts.append(part)
            records[part.key.fingerprint] = record
            computed += new
            reporter.update(len(parts), f"{sum(r.rows for r in records.values())} prompts", total=len(parts))
    if not any(record.rows for record in records.values()):
        reasons = _top_reasons(store, list(records.values()))
        raise DataError(f"prompts: no usable prompt in {config.prompts.source}{reasons}")
    return replace(plan, parts=tuple(parts), records=records, known=True), computed


def _commit_manifest(plan: StagePlan, config: "PipelineConfig", store: Store, seconds: float) -> Manifest:
    records = tuple(plan.records[part.key.fingerprint] for part in plan.parts)
    existing = store.manifest(plan.stage, plan.fingerprint)
    if existing is not None and existing.parts == records:
        return existing
    metadata: dict[str, Any] = {}
    if plan.stage == "prompts":
        metadata = {"source": config.prompts.source, "eval_source": config.prompts.eval_source}
    elif plan.stage == "evaluation" and records:
        metadata = {"summary": evaluation.summary(config, store, plan)}
    manifest = manifest_of(
        plan.stage,
        plan.family,
        records,
        config=dict(plan.settings),
        inputs=dict(plan.outside),
        parents=dict(plan.parents),
        seconds=seconds,
        metadata=metadata,
    )
    return store.commit_manifest(replace(manifest, fingerprint=plan.fingerprint))


def _note_run(config: "PipelineConfig", store: Store, result: StageResult) -> None:
    """Name the artifact in `runs/<name>.json`.

    Later stages keep what was noted for them only while it belongs to this configuration and was made from this artifact.
    """
    noted = store.run(config.name) or {}
    settings = config.model_dump(mode="json")
    before: dict[str, Any] = noted.get("stages", {})
    same = (
        noted.get("config") == settings
        and before.get(result.stage, {}).get("fingerprint") == result.fingerprint
    )
    order = list(STAGES)
    kept = order if same else order[: order.index(result.stage)]
    stages = {name: entry for name, entry in before.items() if name in kept}
    stages[result.stage] = {
        "fingerprint": result.fingerprint,
        "seconds": result.seconds,
        "parts_computed": result.parts_computed,
        "parts_cached": result.parts_cached,
    }
    if before != stages or noted.get("config") != settings:
        store.write_run(
            config.name, {"name": config.name, "config": settings, "stages": stages, "updated": now()}
        )


def _check_rejects(manifest: Manifest, config: "PipelineConfig", store: Store) -> None:
    if not manifest.rejects:
        return
    lost, total = _lost_rows(manifest, store)
    share = lost / total if total else 0.0
    where = store.url_of(manifest.rejects_key)
    if share > config.run.max_reject_fraction:
        raise DataError(
            f"{manifest.stage}: {lost} of {total} rows cannot be used ({share:.0%}, and run.max_reject_fraction is "
            f"{config.run.max_reject_fraction:.0%}){_top_reasons(store, manifest.parts)}. "
            f"They are in {where}; mend the data, or raise run.max_reject_fraction to go on without them"
        )
    log.warning("%s: %d of %d rows cannot be used; reasons in %s", manifest.stage, lost, total, where)


def _lost_rows(manifest: Manifest, store: Store) -> tuple[int, int]:
    """How many of the stage's rows are lost, and how many there would be: a reject is not always one row."""
    if manifest.stage == "rewards":  # a completion without a reward keeps its row
        return manifest.rejects, manifest.rows
    if manifest.stage == "completions":  # a prompt that cannot be asked loses every sample of the part
        blocks = [
            record.metadata.get("stop", 1) - record.metadata.get("start", 0) for record in manifest.parts
        ]
        lost = sum(record.rejects * block for record, block in zip(manifest.parts, blocks, strict=True))
    elif manifest.stage == "shards":  # one completion may be left out and its prompt's row stays
        rejects = [store.read_rejects(record) for record in manifest.parts if record.rejects]
        lost = sum(row["key"] == row["prompt_id"] for table in rejects for row in table.to_pylist())
    else:
        lost = manifest.rejects
    return lost, manifest.rows + lost


def _top_reasons(store: Store, records: Sequence[PartRecord], most: int = 3) -> str:
    counts: Counter[str] = Counter()
    for record in records:
        if record.rejects:
            counts.update(store.read_rejects(record)["reason"].to_pylist())
    shown = "; ".join(f"{reason} ({count}x)" for reason, count in counts.most_common(most))
    return f": {shown}" if shown else ""
