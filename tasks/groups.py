"""What is missing of a stage, computed group by group, each group a Prefect task: here, or on workers.

The task is the unit that Prefect shows and retries; the part is the unit of commit. So a task that is retried, or a run that is
started again after a kill, computes only the parts of its group that are not there yet.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from qrpo.processes.child import Child
from storage import PartKey, PartRecord, Store
from storage.leases import Leases
from tasks.engines import close_engine, keep
from tasks.plan import PartPlan, StagePlan
from tasks.progress import Reporter, reporting
from tasks.retries import RETRY_DELAYS, retry_if_transient
from tasks.reuse import with_candidates
from tasks.runners import RemoteWork, WorkerPool, uses_workers
from tasks.stages import evaluation
from tasks.work import Progress, Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["compute_missing", "compute_parts"]

log = logging.getLogger("qrpo")

Group = tuple[str, Sequence[PartPlan]]  # a label and the parts of one task

_IN_CHILD = {"reference", "shards", "policy"}  # each loads a model, whose memory must come back
_TRAINS = {"reference", "policy"}  # each saves a checkpoint when it is told to end
_PATIENCE = 300.0  # seconds that it has for this


def compute_missing(plan: StagePlan, config: "PipelineConfig", store: Store, force: bool) -> int:
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
    workers = stack.enter_context(WorkerPool(config, store.url, uses_gpu=stage != "quantiles"))

    def arguments(group: Group) -> dict[str, Any]:
        return {"label": group[0], "work": RemoteWork(work(group), workers.setup)}

    def spread(groups: Iterable[Group]) -> Iterator[Group]:
        for group, _ in workers.run(timed, groups, arguments):
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
    retry_condition_fn=retry_if_transient,
)
def compute_parts(label: str, work: Work | RemoteWork, reporter: Reporter | None = None) -> list[str]:
    """Compute and commit one group of parts; the fingerprints of those that were computed in this attempt.

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
            reporter.update(before + len(committed))
    return committed


def _items(work: Work) -> Iterator[PartRecord | Progress]:
    module = f"tasks.stages.{work.stage}"
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
    patience = _PATIENCE if work.stage in _TRAINS else 0.0
    child = keep(
        (target, log, threads),
        lambda: Child(
            "qrpo.processes.serving:GeneratorFunction",
            target,
            name=target,
            log=log,
            env=environment,
            patience=patience,
        ),
    )
    return child.stream("run", work, *more)
