"""Where the groups of a stage are computed: in this process, or spread over the workers of a process pool, Dask or Ray.

A runner is one of Prefect's task runners, opened for one stage and closed with it, so that no engine of one stage is left on
a GPU that the next stage needs. What a group computes does not depend on where; a worker needs the configuration, the store and
nothing of this machine's disk. What is decided here, and why:

- the driver hands out groups as workers become free, two for each worker, so that leases are claimed just before the work starts;
- leases are the driver's: it has the one heartbeat, however many workers come and go. A worker that dies takes no lease with
  it; a driver that dies is followed by its workers, and another run takes its parts over;
- a worker does one group at a time and keeps its engine for the next one; it sees only its own GPUs;
- a group whose worker died is given to another one: by Dask and Ray themselves, for the process pool here. Parts that the dead
  worker had committed are not computed again.
"""

import math
import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from glob import glob
from importlib import import_module
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from qrpo.errors import ConfigError, EngineError, QRPOError
from tasks.config import PipelineConfig
from tasks.engines import close_engine
from tasks.stages import STAGES
from tasks.work import Work

__all__ = ["Errand", "Place", "Workers", "uses_workers"]

T = TypeVar("T")

_AHEAD = 2  # groups for each worker that are handed out: one at work, one waiting
_MOST_DEATHS = (
    3  # of process pool workers with no group finished in between; Dask and Ray have the same by default
)


@dataclass(frozen=True)
class Place:
    """What a worker must know of where it is."""

    runner: str
    stage: str = ""
    """Names one stage of one run: what arrives after that was ended is turned away."""
    driver: int = 0
    """The process that a worker on this machine ends with; 0 on a cluster of other machines."""
    gpus: tuple[str, ...] = ()
    """The GPUs that the workers of this machine share out among themselves."""
    gpus_per_worker: int = 0

    def settle(self) -> None:
        """See only this worker's GPUs, and end with the driver."""
        if self.gpus and self.gpus_per_worker:
            first = _worker_number(self.runner) * self.gpus_per_worker % len(self.gpus)
            own = self.gpus[first : first + self.gpus_per_worker]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        if self.driver and not _watching.is_set():
            _watching.set()
            threading.Thread(target=_end_with, args=(self.driver,), name="watch-driver", daemon=True).start()


class Errand:
    """Work on its way to a worker. A plain object, since Prefect and Dask take tuples and dataclasses apart."""

    def __init__(self, work: Work[Any], place: Place) -> None:
        self._work, self._place = work, place

    def arrive(self) -> Work[Any]:
        """The work, once the worker is ready for it. A retry comes here again; it does not outlive its run."""
        if self._place.stage in _ended:
            raise QRPOError("the run that this work is for has ended")
        self._place.settle()
        return self._work


_ended: set[str] = set()  # stages, in a worker of a cluster that outlives them


def _end_stage(stage: str) -> None:
    """Called in every worker of a cluster that is not ours."""
    _ended.add(stage)
    close_engine()


_watching = threading.Event()


def _worker_number(runner: str) -> int:
    """Workers of one pool or local cluster are numbered one after another."""
    if runner == "dask":
        from distributed import get_worker

        return int(get_worker().name)
    return int(multiprocessing.current_process().name.rpartition("-")[2])


def _end_with(driver: int) -> None:
    while os.getppid() == driver:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)  # and what it started goes with it, see qrpo.processes.child


def uses_workers(config: PipelineConfig, parts: int) -> bool:
    """Whether this many parts are for workers: on this machine only where there is something to share out.

    A single part (a training run) then stays in this process, where it sees all GPUs.
    """
    return config.run.runner != "local" and (parts > 1 or config.run.cluster is not None)


class Workers:
    """The workers of one stage, while the block runs.

    Raises ConfigError where the runner's package is not installed, its cluster does not answer, or the store is this process's alone.
    """

    def __init__(self, stage: str, config: PipelineConfig, store_url: str) -> None:
        run = config.run
        if store_url.startswith("memory://"):
            raise ConfigError(
                f"run.runner {run.runner}: workers cannot see a memory:// store; use another one"
            )
        self.kind, self.cluster = run.runner, run.cluster
        engine = config.completions.engine
        gpus = _gpus()
        wanted = engine.tensor_parallel_size * engine.pipeline_parallel_size
        self.gpus_per_worker = (
            run.gpus_per_worker if run.gpus_per_worker is not None else wanted if gpus else 0
        )
        if not STAGES[stage].uses_gpu:
            self.gpus_per_worker = 0
        share = len(gpus) // self.gpus_per_worker if self.gpus_per_worker else os.cpu_count() or 1
        self.count = run.workers or (0 if run.cluster else max(1, share))
        here = self.kind != "ray" and run.cluster is None
        if here and gpus and self.count * self.gpus_per_worker > len(gpus):
            raise ConfigError(
                f"run.workers: {self.count} workers of {self.gpus_per_worker} GPUs each do not fit the {len(gpus)} GPUs "
                "that are visible here; lower run.workers or run.gpus_per_worker"
            )
        driver = os.getpid() if here else 0
        token = secrets.token_hex(8)
        self.place = Place(self.kind, token, driver, gpus if here else (), self.gpus_per_worker)
        self._stack = ExitStack()
        self._runner: TaskRunner[Any] | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(at_once=error is not None)

    def group_size(self, parts: int, most: int) -> int:
        """Parts of one group, at most `most`: fewer where there would not be enough groups for all workers."""
        return max(1, min(most, math.ceil(parts / (_AHEAD * self.count))))

    def spread(
        self, task: Any, calls: Iterable[T], arguments: Callable[[T], dict[str, Any]]
    ) -> Iterator[tuple[T, Any]]:
        """Each call with the task's result, as they end. The next calls are taken while earlier ones are at work.

        Raises what a task raises, and EngineError where a call's workers keep dying.
        """
        coming, lost = iter(calls), deque[T]()
        running: dict[PrefectFuture[Any], T] = {}
        deaths = 0
        while True:
            while len(running) < _AHEAD * self.count:
                call = lost.popleft() if lost else next(coming, None)
                if call is None:
                    break
                assert self._runner is not None
                running[self._runner.submit(task, parameters=arguments(call))] = call
            if not running:
                return
            done = next(as_completed(list(running)))
            call = running.pop(done)
            try:
                result = done.result()
            except BrokenProcessPool:
                deaths += 1
                if deaths > _MOST_DEATHS:
                    raise EngineError(_death(deaths)) from None
                lost.extend([call, *running.values()])
                running.clear()
                self._close(at_once=True)
                self._open()
            except QRPOError:
                raise
            except Exception as error:
                if type(error).__name__ in _LOST:
                    raise EngineError(f"{_death(_MOST_DEATHS + 1)} ({type(error).__name__})") from error
                raise
            else:
                deaths = 0
                yield call, result

    def _open(self) -> None:
        try:
            self._runner = {"process": self._process, "dask": self._dask, "ray": self._ray}[self.kind]()
            self._stack.enter_context(self._runner)
            if self.kind == "dask":
                self.count = self.count or sum(cast(Any, self._runner).client.nthreads().values())
            elif self.kind == "ray":
                self.count = self.count or self._ray_slots()
        except ImportError as error:
            raise ConfigError(
                f"run.runner is {self.kind}, which is not installed ({error}): `pip install 'qrpo-pipeline[{self.kind}]'`"
            ) from None
        except (OSError, TimeoutError, ConnectionError) as error:
            if self.cluster is None:
                raise
            told = f"run.cluster: no {self.kind} cluster answers at {self.cluster}: {error}"
            if self.kind == "ray" and "RAY_AUTH_MODE" not in os.environ:
                told += "; one that wants a token needs RAY_AUTH_MODE=token here, and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            raise ConfigError(told) from None
        if not self.count:
            raise ConfigError(f"run.cluster: the {self.kind} cluster at {self.cluster} has no workers yet")

    def _process(self) -> TaskRunner[Any]:
        return ProcessPoolTaskRunner(max_workers=self.count)

    def _dask(self) -> TaskRunner[Any]:
        from prefect_dask.task_runners import DaskTaskRunner

        if self.cluster is not None:
            return DaskTaskRunner(address=self.cluster)
        # no limit of memory: what a worker loads lies in its children, which Dask does not see
        local = {
            "n_workers": self.count,
            "threads_per_worker": 1,
            "memory_limit": 0,
            "dashboard_address": None,
        }
        return DaskTaskRunner(cluster_kwargs=local)

    def _ray(self) -> TaskRunner[Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        task_runners: Any = import_module("prefect_ray.task_runners")
        remote_options: Any = import_module("prefect_ray.context").remote_options
        # GPU workers live for one task unless told otherwise: then each group would start its engine anew
        self._stack.enter_context(remote_options(num_cpus=1, num_gpus=self.gpus_per_worker, max_calls=0))
        quiet = {"log_to_driver": False, "logging_level": "error"}
        if self.cluster is not None:
            return cast(TaskRunner[Any], task_runners.RayTaskRunner(address=self.cluster, init_kwargs=quiet))
        local = {"num_cpus": self.count, "include_dashboard": False, **quiet}
        return cast(TaskRunner[Any], task_runners.RayTaskRunner(address="local", init_kwargs=local))

    def _ray_slots(self) -> int:
        ray: Any = import_module("ray")
        resources = ray.cluster_resources()
        if self.gpus_per_worker:
            return int(resources.get("GPU", 0) // self.gpus_per_worker)
        return int(resources.get("CPU", 0))

    def _close(self, at_once: bool) -> None:
        if self.kind == "dask" and self.cluster is not None and self._runner is not None:
            cast(Any, self._runner).client.run(_end_stage, self.place.stage)
        if at_once and self.kind == "process":
            for process in multiprocessing.active_children():  # a pool would wait for the end of its groups
                process.kill()
        self._runner = None
        self._stack.close()


_LOST = {"KilledWorker", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError"}  # of Dask and Ray


def _death(times: int) -> str:
    return (
        f"the workers of one group of parts died {times} times one after another (the system kills them where memory runs "
        "out): give them more memory, or lower run.workers. What they committed is kept"
    )


def _gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name for name in visible.split(",") if name)
    return tuple(str(number) for number in range(len(glob("/dev/nvidia[0-9]*"))))
