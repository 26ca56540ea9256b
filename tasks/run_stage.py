"""One stage from plan to manifest: its parts, what they came to together, and the run's note of it.

Prefect is loaded only where something is to be computed (`tasks.groups`): a run that finds everything in the store needs none.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qrpo.errors import DataError
from storage import Manifest, PartRecord, Store, manifest_of
from storage.manifest import now
from tasks.config import PipelineConfig
from tasks.plan import StagePlan
from tasks.planner import Planner, planner_of
from tasks.progress import reporting
from tasks.reuse import note_family
from tasks.stage import Stage
from tasks.stages import STAGE_NAMES, STAGES

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
    rows_computed: int
    """Units of paid work: samples, scores, log-probabilities."""
    rows_reused: int
    """The same, taken from rows of committed parts."""
    seconds: float


def run_stage(
    stage: str, config: PipelineConfig, store_url: str, *, force: bool = False, planner: Planner | None = None
) -> StageResult:
    """Compute what is missing of `stage` (all of it where `force`), commit its manifest, note it in the run.

    Call it within a Prefect flow where anything is to be computed. Raises ConfigError where a parent stage is not complete,
    DataError where the stage loses more rows than `run.max_reject_fraction`; every part that was committed stays.
    """
    started = time.monotonic()
    planner = planner or planner_of(config, store_url)
    store = planner.store
    of = STAGES[stage]
    plan = planner.plan(stage)
    planner.require_parents(stage)
    computed: tuple[PartRecord, ...] = ()
    if of.read is not None:
        if force or not plan.complete:
            plan, computed = _read(of, plan, planner)
    elif force or plan.missing:
        from tasks.groups import compute_missing

        if force:
            plan = planner.cut_anew(stage)
        note_family(store, of, plan)
        done = compute_missing(plan, config, store, force)
        plan = planner.computed(
            plan
        )  # even where nothing was computed here: another run may have done it all
        assert plan.complete, f"{stage}: {len(plan.missing)} parts are missing after they were computed"
        computed = tuple(plan.records[key.fingerprint] for key in done)
    manifest = _commit_manifest(of, plan, config, store, time.monotonic() - started)
    result = StageResult(
        stage=stage,
        fingerprint=plan.fingerprint,
        rows=manifest.rows,
        rejects=manifest.rejects,
        parts_computed=len(computed),
        parts_cached=len(plan.parts) - len(computed),
        rows_computed=sum(record.metadata.get("computed", 0) for record in computed),
        rows_reused=sum(record.metadata.get("reused", 0) for record in computed),
        seconds=round(time.monotonic() - started, 3),
    )
    _note_run(config, store, result)
    log.info("%s", _line(result))
    _check_rejects(of, manifest, config, store)
    return result


def _line(result: StageResult) -> str:
    counts = [f"{result.parts_computed} computed"] if result.parts_computed else []
    counts += [f"{result.parts_cached} cached"] if result.parts_cached else []
    parts = ", ".join(counts) or "nothing to do"
    return f"{result.stage:<12} {parts}; {result.rows:,} rows, {result.seconds:.1f} s"


def _read(stage: Stage[Any], plan: StagePlan, planner: Planner) -> tuple[StagePlan, tuple[PartRecord, ...]]:
    """Run a stage that finds its parts by reading: its plan, and the parts that are new."""
    config, store = planner.config, planner.store
    work = stage.work(config, store)
    records, new = [], []
    with reporting(stage.name, 0) as reporter:
        for record, is_new in stage.compute(work):
            records.append(record)
            new += [record] if is_new else []
            rows = sum(known.rows for known in records)
            reporter.update(len(records), f"{rows} {stage.unit}", total=len(records))
    if not any(record.rows for record in records):
        reasons = _top_reasons(store, records)
        raise DataError(f"{stage.name}: no usable prompt in {config.prompts.source}{reasons}")
    return planner.read(plan, tuple(records)), tuple(new)


def _commit_manifest(
    stage: Stage[Any], plan: StagePlan, config: PipelineConfig, store: Store, seconds: float
) -> Manifest:
    records = tuple(plan.records[part.key.fingerprint] for part in plan.parts)
    existing = store.manifest(plan.stage, plan.fingerprint)
    if existing is not None and existing.parts == records:
        return existing
    described = stage.describe(stage.settings_of(config), store, plan) if stage.describe else {}
    manifest = manifest_of(
        plan.stage,
        plan.family,
        records,
        config=dict(plan.settings),
        inputs=dict(plan.outside),
        parents=dict(plan.parents),
        seconds=seconds,
        metadata={**described, "version": stage.version, "reads": stage.read_values(config)},
    )
    return store.commit_manifest(replace(manifest, fingerprint=plan.fingerprint))


def _note_run(config: PipelineConfig, store: Store, result: StageResult) -> None:
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
    order = list(STAGE_NAMES)
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


def _check_rejects(stage: Stage[Any], manifest: Manifest, config: PipelineConfig, store: Store) -> None:
    if not manifest.rejects:
        return
    lost, total = stage.lost_rows(manifest, store)
    share = lost / total if total else 0.0
    where = store.url_of(manifest.rejects_key)
    if share > config.run.max_reject_fraction:
        raise DataError(
            f"{manifest.stage}: {lost} of {total} rows cannot be used ({share:.0%}, and run.max_reject_fraction is "
            f"{config.run.max_reject_fraction:.0%}){_top_reasons(store, manifest.parts)}. "
            f"They are in {where}; mend the data, or raise run.max_reject_fraction to go on without them"
        )
    log.warning("%s: %d of %d rows cannot be used; reasons in %s", manifest.stage, lost, total, where)


def _top_reasons(store: Store, records: Sequence[PartRecord], most: int = 3) -> str:
    counts: Counter[str] = Counter()
    for record in records:
        if record.rejects:
            counts.update(store.read_rejects(record)["reason"].to_pylist())
    shown = "; ".join(f"{reason} ({count}x)" for reason, count in counts.most_common(most))
    return f": {shown}" if shown else ""
