"""One stage from plan to manifest: its parts, its manifest and the run's note.

Prefect is loaded only where something is to be computed (`tasks.groups`): a run that finds
everything in the store needs none.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qrpo.errors import DataError
from storage import DamagedError, Manifest, PartRecord, Store, manifest_of
from storage.leases import Leases
from storage.manifest import manifest_key
from tasks.config import PipelineConfig
from tasks.plan import StagePlan, make_family
from tasks.planner import Planner, planner_of
from tasks.progress import reporting
from tasks.reuse import note_family
from tasks.run_note import is_noted, note_artifact, note_families
from tasks.stage import Stage
from tasks.stages import STAGES

log = logging.getLogger("qrpo")


@dataclass(frozen=True)
class StageResult:
    """The result of one stage of a run. The artifact itself is in the store."""

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
    """Compute what is missing of `stage` (all of it where `force`), commit its manifest, note it in
    the run.

    Call it within a Prefect flow where anything is to be computed. Raises ConfigError where a
    parent stage is not complete, DataError where the stage loses more rows than
    `run.max_reject_fraction`; every part that was committed stays.
    """
    started = time.monotonic()
    planner = planner or planner_of(config, store_url, first=stage)
    store = planner.store
    of = STAGES[stage]
    plan = planner.plan(stage)
    planner.require_parents(stage)
    if of.read is not None and planner.prompts is not None:
        force = False  # the run has read them
    if not force and plan.complete and is_noted(planner, plan):
        planner.check_files(stage)
        manifest = _commit_manifest(of, plan, config, store, 0.0)
        result = _result(plan, manifest, (), started)
    else:
        with Leases(store, config.run.lease_ttl) as leases:
            if force and of.read is None:
                plan = planner.cut_anew(stage)
            plan, computed = _compute(of, plan, planner, force, leases)
            manifest = _commit_manifest(of, plan, config, store, time.monotonic() - started)
            result = _result(plan, manifest, computed, started)
            names = ("fingerprint", "seconds", "parts_computed", "parts_cached")
            note_artifact(planner, stage, {name: getattr(result, name) for name in names}, leases)
    counts = {"computed": result.parts_computed, "cached": result.parts_cached}
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing to do"
    log.info("%-12s %s; %s rows, %.1f s", stage, parts, f"{result.rows:,}", result.seconds)
    if note := manifest.metadata.get("note"):
        log.info("%-12s %s", stage, note)
    _check_rejects(of, manifest, config, store)
    if of.remark and (remark := of.remark(manifest)):
        log.warning("%s: %s", stage, remark)
    return result


def _compute(
    stage: Stage[Any], plan: StagePlan, planner: Planner, force: bool, leases: Leases
) -> tuple[StagePlan, tuple[PartRecord, ...]]:
    """Protect the plan's parts from gc and compute what is missing: the complete plan, and the
    parts that are new."""
    config, store = planner.config, planner.store
    families = sorted({plan.family, *(part.key.family for part in plan.parts)})
    if stage.read is not None:  # of its parts, which are not known before they are read
        families.append(make_family(stage.name, stage.version, {}, {}))
    leases.protect(*families)
    if not force and plan.complete and not store.exists(manifest_key(plan.stage, plan.fingerprint)):
        plan = planner.computed(plan)  # gc may have removed parts before it saw that they are protected
    if not force and plan.complete:
        return plan, ()
    if stage.read is not None:
        return _read(stage, plan, planner)
    from tasks.groups import compute_missing

    note_families(planner, plan.stage, families, leases)
    note_family(store, stage, plan)
    done = compute_missing(plan, config, store, force, leases)
    plan = planner.computed(plan)  # another run may have computed all of it
    if not plan.complete:  # gc removed parts of the plan before it saw that they are protected
        done += compute_missing(plan, config, store, False, leases)
        plan = planner.computed(plan)
    if not plan.complete:
        raise DamagedError(
            f"{plan.stage}: {len(plan.missing)} parts are missing after they were computed, the first is "
            f"{plan.missing[0].key.record}. Another program deletes files of this store, or the store answers with "
            "an old state: start the same command again, or run `qrpo verify --repair`."
        )
    return plan, tuple(plan.records[key.fingerprint] for key in dict.fromkeys(done))


def _result(
    plan: StagePlan, manifest: Manifest, computed: tuple[PartRecord, ...], started: float
) -> StageResult:
    return StageResult(
        stage=plan.stage,
        fingerprint=plan.fingerprint,
        rows=manifest.rows,
        rejects=manifest.rejects,
        parts_computed=len(computed),
        parts_cached=len(plan.parts) - len(computed),
        rows_computed=sum(record.metadata.get("computed", 0) for record in computed),
        rows_reused=sum(record.metadata.get("reused", 0) for record in computed),
        seconds=round(time.monotonic() - started, 3),
    )


def _read(stage: Stage[Any], plan: StagePlan, planner: Planner) -> tuple[StagePlan, tuple[PartRecord, ...]]:
    """Run a stage that finds its parts by reading: its plan, and the parts that are new."""
    config, store = planner.config, planner.store
    work = stage.work(config, store)
    records: list[PartRecord] = []
    new: list[PartRecord] = []
    with reporting(stage.name, 0) as reporter:
        for item in stage.compute(work):
            if isinstance(item, StagePlan):
                plan = item  # the source may have changed since it was planned
                continue
            record, is_new = item
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
    if plan.manifest is not None and plan.manifest.parts == records:
        return plan.manifest
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
            f"They are in {where}; fix the data, or raise run.max_reject_fraction to go on without them"
        )
    log.warning("%s: %d of %d rows cannot be used; reasons in %s", manifest.stage, lost, total, where)


def _top_reasons(store: Store, records: Sequence[PartRecord], most: int = 3) -> str:
    counts: Counter[str] = Counter()
    for record in records:
        if record.rejects:
            counts.update(store.read_rejects(record)["reason"].to_pylist())
    shown = "; ".join(f"{reason} ({count}x)" for reason, count in counts.most_common(most))
    return f": {shown}" if shown else ""
