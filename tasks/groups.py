"""What is missing of a stage, computed group by group, each group a Prefect task: here, or on
workers.

The task is the unit that Prefect shows and retries; the part is the unit of commit. So a task that
is retried, or a run that is started again after a kill, computes only the parts of its group that
are not there yet.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from qrpo.processes.child import Child
from storage import PartKey, PartRecord, Store
from storage.leases import Leases
from tasks.config import PipelineConfig
from tasks.engines import close_engine, keep
from tasks.plan import PartPlan, StagePlan
from tasks.progress import Reporter, reporting
from tasks.retries import NO_RESULT, RETRY_DELAYS, retry_if_transient
from tasks.reuse import with_candidates
from tasks.runners import RemoteWork, WorkerPool, uses_workers
from tasks.stage import Stage
from tasks.stages import STAGES
from tasks.work import Progress, Work

log = logging.getLogger("qrpo")

Group = tuple[str, Sequence[PartPlan]]  # a label and the parts of one task

_CHECKPOINT_SECONDS = 300.0  # for a stage that trains to save a checkpoint on SIGTERM


def compute_missing(
    plan: StagePlan, config: PipelineConfig, store: Store, force: bool, leases: Leases
) -> list[PartKey]:
    """Compute what is missing, and wait for what another run on this store is working on. Returns
    what was computed here."""
    missing = plan.parts if force else plan.missing
    if not missing:
        return []
    stage = STAGES[plan.stage]
    present = store.find_parts([part.key for part in missing])
    parts = tuple(replace(part, replace=part.key.fingerprint in present) for part in missing)
    if not force:
        parts = with_candidates(store, stage, plan, parts)
    theirs: dict[PartKey, PartPlan] = {}
    later: list[PartPlan] = []  # ours, made from parts of theirs
    computed: list[PartKey] = []

    def can_start(part: PartPlan) -> bool:
        return theirs.keys().isdisjoint(part.inputs)

    with ExitStack() as stack:
        reporter = stack.enter_context(reporting(plan.stage, len(parts)))
        stack.callback(close_engine)
        whole = replace(stage.work(config, store), holder=leases.holder)
        size, compute = _computing(whole, config, len(parts), reporter, stack)
        groups = _groups(parts, size)

        def ours() -> Iterator[Group]:
            for number, group in enumerate(groups, start=1):
                _, keys, others = leases.share((part.key for part in group), present)
                theirs.update({part.key: part for part in group if part.key in others})
                mine = [part for part in group if part.key in keys]
                later.extend(part for part in mine if not can_start(part))
                if now := [part for part in mine if can_start(part)]:
                    yield f"{plan.stage} {number}/{len(groups)}", now

        def taken_over() -> Iterator[Group]:
            for key, record in leases.wait(theirs, config.run.lease_patience, known=present):
                part = theirs.pop(key)
                ready = [part for part in later if can_start(part)]
                later[:] = [part for part in later if not can_start(part)]
                if record is None:
                    ready = [part, *ready]
                if ready:
                    yield f"{plan.stage} after {key.fingerprint[:8]}", ready

        for coming in (ours, taken_over):
            for _, group in compute(coming()):
                computed += [part.key for part in group]
                for part in group:
                    leases.release(part.key)
        reporter.update(len(parts), total=len(parts))  # other runs may have computed some
    return computed


def _groups(parts: Sequence[PartPlan], size: int) -> list[list[PartPlan]]:
    """The parts in groups of about `size`. A part that is made from another one is in its group."""
    groups: list[list[PartPlan]] = []
    for part in parts:
        before = {one.key for one in groups[-1]} if groups else set()
        if groups and (len(before) < size or not before.isdisjoint(part.inputs)):
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _computing(
    whole: Work[Any], config: PipelineConfig, parts: int, reporter: Reporter, stack: ExitStack
) -> tuple[int, Callable[[Iterable[Group]], Iterator[Group]]]:
    """How many parts a group should have, and what computes groups, giving each back when it is
    done: here, or on workers."""

    def work(group: Group) -> Work[Any]:
        return whole.only(group[1])

    timed = compute_parts.with_options(timeout_seconds=config.run.task_timeout)

    def here(groups: Iterable[Group]) -> Iterator[Group]:
        for group in groups:
            # quoted, so that Prefect does not walk through them
            quoted: tuple[Any, Any] = quote(work(group)), quote(reporter)
            timed(group[0], *quoted)
            yield group

    if not uses_workers(config, parts):
        return config.run.parts_per_task, here
    of = STAGES[whole.stage]
    workers = stack.enter_context(
        WorkerPool(config, whole.store.url, uses_gpu=of.uses_gpu, need=of.gpus(whole.settings))
    )

    def arguments(group: Group) -> dict[str, Any]:
        return {"label": group[0], "work": RemoteWork(work(group), workers.setup)}

    def spread(groups: Iterable[Group]) -> Iterator[Group]:
        for group, _ in workers.run(timed, groups, arguments):
            reporter.update(reporter.done + len(group[1]), f"{workers.count} workers")
            yield group

    return workers.group_size(parts, config.run.parts_per_task), spread


@task(
    name="compute parts",
    task_run_name="{label}",
    cache_policy=NO_CACHE,
    **NO_RESULT,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=0.2,
    retry_condition_fn=retry_if_transient,
)
def compute_parts(label: str, work: Work[Any] | RemoteWork, reporter: Reporter | None = None) -> list[str]:
    """Compute and commit one group of parts; the fingerprints of those that were computed in this
    attempt.

    A worker gets its work as `RemoteWork` and reports no progress: the driver counts its groups.
    """
    work = work.receive() if isinstance(work, RemoteWork) else work
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
            reporter.update(
                before + len(committed), total=reporter.parts
            )  # a part may have counted its steps
    return committed


def _items(work: Work[Any]) -> Iterator[PartRecord | Progress]:
    """What the stage yields; where it fails because another run has taken over, that is the
    error."""
    stage = STAGES[work.stage]
    try:
        prepared = (stage.prepare(work),) if stage.prepare is not None else ()
        compute = partial(_in_child, stage) if stage.in_child else stage.compute
        yield from compute(work, *prepared)
    except Exception:
        for part in work.parts:
            work.check_lease(part)
        raise


def _in_child(stage: Stage[Any], work: Work[Any], *prepared: Any) -> Iterator[PartRecord | Progress]:
    """What the stage's `compute` yields in a child process, which is kept for the stage's next
    group."""
    if work.store.url.startswith("memory://"):  # that store is this process's alone
        return stage.compute(work, *prepared)
    threads = work.run.cpu_threads
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    log, target = work.log, stage.target
    child = keep(
        (target, log, threads),
        lambda: Child(
            "qrpo.processes.serving:GeneratorFunction",
            target,
            name=target,
            log=log,
            env=environment,
            patience=_CHECKPOINT_SECONDS if stage.trains else 0.0,
        ),
    )
    return child.stream("run", work, *prepared)
