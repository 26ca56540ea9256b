"""One stage from plan to manifest: what is missing is computed group by group, each group a Prefect task.

The task is the unit that Prefect shows and retries; the part is the unit of commit. So a task that is retried, or a run that is
started again after a kill, computes only the parts of its group that are not there yet.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from qrpo.child import Child
from qrpo.errors import DataError
from storage import Manifest, PartKey, PartRecord, Store, manifest_of
from storage.leases import Leases
from storage.manifest import now
from tasks import evaluation, prompts
from tasks.engines import close_engine, keep
from tasks.plan import PartPlan, StagePlan
from tasks.progress import Reporter, reporting
from tasks.retries import RETRY_DELAYS, worth_another_try
from tasks.runners import Errand, Workers, uses_workers
from tasks.salvage import with_candidates
from tasks.stages import STAGES, plan_pipeline, require_parents
from tasks.work import Progress, Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["StageResult", "run_stage"]

log = logging.getLogger("qrpo")

_IN_CHILD = {"reference", "shards", "policy"}  # each loads a model, whose memory must come back


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
        computed = _compute_missing(plan, config, store, force)
        plan = plan_pipeline(config, store, until=stage)[stage] if computed else plan
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


def _compute_missing(plan: StagePlan, config: "PipelineConfig", store: Store, force: bool) -> int:
    """Compute what is missing, but for what another run on this store is working on: that is waited for. How many were computed."""
    missing = plan.parts if force else plan.missing
    if not missing:
        return 0
    present = store.find_parts([part.key for part in missing])
    parts = tuple(replace(part, replace=part.key.fingerprint in present) for part in missing)
    if not force:
        parts = with_candidates(store, plan, parts)
    theirs: dict[PartKey, PartPlan] = {}
    computed = 0
    with ExitStack() as stack:
        reporter = stack.enter_context(reporting(plan.stage, len(parts)))
        leases = stack.enter_context(Leases(store, config.run.lease_ttl))
        stack.callback(close_engine)
        for family in {part.key.family for part in parts}:
            leases.protect(family)
        size, compute = _computing(plan.stage, config, store, len(parts), reporter, stack)
        groups = [parts[start : start + size] for start in range(0, len(parts), size)]

        def ours() -> Iterator[Group]:
            for number, group in enumerate(groups, start=1):
                mine, others = _share(leases, group)
                theirs.update({part.key: part for part in others})
                if mine:
                    yield f"{plan.stage} {number}/{len(groups)}", mine

        def taken_over() -> Iterator[Group]:
            for key, record in leases.wait(theirs, patience=config.run.lease_patience):
                if record is None:
                    yield f"{plan.stage} taken over {key.fingerprint[:8]}", [theirs[key]]

        for coming in (ours, taken_over):
            for _, group in compute(coming()):
                computed += len(group)
                for part in group:
                    leases.release(part.key)
    return computed


Group = tuple[str, Sequence[PartPlan]]  # a label and the parts of one task


def _computing(
    stage: str, config: "PipelineConfig", store: Store, parts: int, reporter: Reporter, stack: ExitStack
) -> tuple[int, Callable[[Iterable[Group]], Iterator[Group]]]:
    """How many parts a group should have, and what computes groups, giving each back when it is done: here, or on workers."""

    def work(group: Group) -> Work:
        return Work(stage, config, store.url, tuple(group[1]))

    timed = compute_parts.with_options(timeout_seconds=config.run.task_timeout)

    def here(groups: Iterable[Group]) -> Iterator[Group]:
        for group in groups:
            # quoted, so that Prefect does not walk through them
            quoted: tuple[Any, Any] = quote(work(group)), quote(reporter)
            timed(group[0], *quoted)
            yield group

    if not uses_workers(config, parts):
        return config.run.parts_per_task, here
    workers = stack.enter_context(Workers(stage, config, store.url))

    def errand(group: Group) -> dict[str, Any]:
        return {"label": group[0], "work": Errand(work(group), workers.place)}

    def spread(groups: Iterable[Group]) -> Iterator[Group]:
        for group, _ in workers.spread(timed, groups, errand):
            reporter.update(reporter.done + len(group[1]), f"{workers.count} workers")
            yield group

    return workers.group_size(parts, config.run.parts_per_task), spread


def _share(leases: Leases, group: Sequence[PartPlan]) -> tuple[list[PartPlan], list[PartPlan]]:
    """Which parts of the group are ours to compute now, and which another run is working on."""
    _, mine, others = leases.share(part.key for part in group if not part.replace)
    return (
        [part for part in group if part.replace or part.key in mine],
        [part for part in group if part.key in others],
    )


@task(
    name="compute parts",
    task_run_name="{label}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=0.2,
    retry_condition_fn=worth_another_try,
)
def compute_parts(label: str, work: Work | Errand, reporter: Reporter | None = None) -> list[str]:
    """Compute and commit one group of parts; the fingerprints of those that were computed in this attempt.

    A worker, which gets its work as an errand, reports nothing in between: the driver counts its groups.
    """
    work = work.arrive() if isinstance(work, Errand) else work
    reporter = reporter or Reporter(work.stage, len(work.parts), None)
    todo = [
        part for part in work.parts if part.replace or work.store.part(part.key) is None
    ]  # a retry comes here again
    before = reporter.done + len(work.parts) - len(todo)
    committed: list[str] = []
    for item in _items(work.only(todo)) if todo else ():
        if isinstance(item, Progress):
            reporter.update(item.done, item.message, total=item.total)
        else:
            committed.append(item.fingerprint)
            log.debug("%s: committed %s (%d rows)", label, item.fingerprint, item.rows)
            reporter.update(before + len(committed))
    return committed


def _items(work: Work) -> Iterator[PartRecord | Progress]:
    module = f"tasks.{work.stage}"
    if work.stage == "evaluation":
        yield from _in_child(f"{module}:compute", work, evaluation.sample(work))
    elif work.stage in _IN_CHILD:
        yield from _in_child(f"{module}:compute", work)
    else:
        yield from import_module(module).compute(work)


def _in_child(target: str, work: Work, *more: Any) -> Iterator[PartRecord | Progress]:
    """What the generator function yields in a child process, which is kept for the stage's next group."""
    if work.store.url.startswith("memory://"):  # that store is this process's alone
        module, _, function = target.partition(":")
        return getattr(import_module(module), function)(work, *more)  # type: ignore[no-any-return]
    threads = work.config.run.cpu_threads
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    log = work.log
    child = keep(
        (target, log, threads),
        lambda: Child("qrpo.serving:GeneratorFunction", target, name=target, log=log, env=environment),
    )
    return child.stream("run", work, *more)


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
