"""Where the groups of a stage are computed: in this process, or on workers of a process pool, Dask
or Ray.

A pool of workers is one of Prefect's task runners. It is opened for one stage and closed with it,
so that no engine stays on a GPU that the next stage needs. A worker needs the configuration and the
store, nothing from this machine's disk. Its results do not depend on where it runs. The rules:

- The driver submits groups as workers become free, two per worker, so that leases are claimed just
  before the work starts.
- The driver holds all leases and sends their heartbeat. A worker that dies holds none. If the
  driver dies, its workers end too, and another run takes over its parts.
- A worker computes one group at a time, keeps its engine for the next group, and sees only its own
  GPUs.
- If a worker dies, another one gets its group: Dask and Ray do this themselves, `WorkerPool.run`
  does it for the process pool. Parts that the dead worker had committed are not computed again.
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
from typing import Any, Self, TypeVar

from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from qrpo.errors import ConfigError, EngineError, QRPOError
from tasks.config import PipelineConfig
from tasks.engines import close_engine
from tasks.work import Work

T = TypeVar("T")

_GROUPS_PER_WORKER = 2  # submitted at a time: one running, one waiting
_MAX_DEATHS = 3  # of pool workers without a finished group in between; Dask and Ray have the same default
_WORKER_DIED = {
    "BrokenProcessPool",
    "KilledWorker",
    "WorkerCrashedError",
    "NodeDiedError",
    "OutOfMemoryError",
}


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker process must set up before it works."""

    runner: str
    session: str = ""
    """Identifies one stage of one run. A worker rejects work of a session that has ended."""
    driver: int = 0
    """Process id of the driver on this machine, with which the worker ends; 0 on a cluster."""
    gpus: tuple[str, ...] = ()
    """GPUs of this machine, shared by its workers."""
    gpus_per_worker: int = 0

    def apply(self) -> None:
        """Limit this process to its own GPUs, and end it when the driver ends."""
        if self.gpus and self.gpus_per_worker:
            if self.runner == "dask":
                from distributed import get_worker

                name = get_worker().name
            else:
                name = multiprocessing.current_process().name.rpartition("-")[2]
            # the workers of one pool or local cluster have consecutive numbers
            first = int(name) * self.gpus_per_worker % len(self.gpus)
            own = self.gpus[first : first + self.gpus_per_worker]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        if self.driver and not _watching.is_set():
            _watching.set()
            threading.Thread(target=_end_with, args=(self.driver,), name="watch-driver", daemon=True).start()


class RemoteWork:
    """Work that is sent to a worker. A plain object, since Prefect and Dask copy tuples and
    dataclasses item by item."""

    def __init__(self, work: Work[Any], setup: WorkerSetup) -> None:
        self._work, self._setup = work, setup

    def receive(self) -> Work[Any]:
        """Set up this worker and return the work. A retry calls this again; raises QRPOError if the
        run has ended."""
        if self._setup.session in _ended_sessions:
            raise QRPOError("the run of this work has ended")
        self._setup.apply()
        return self._work


_watching = threading.Event()
_ended_sessions: set[str] = set()  # in a worker of a cluster that is still running


def _end_session(session: str) -> None:
    """Run in every worker of a cluster that outlives the run."""
    _ended_sessions.add(session)
    close_engine()


def _end_with(driver: int) -> None:
    while os.getppid() == driver:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)  # its child processes then end too, see qrpo.processes.child


def uses_workers(config: PipelineConfig, parts: int) -> bool:
    """Whether workers compute this many parts. On this machine, a single part (a training run)
    stays in this process: it sees all GPUs."""
    return config.run.runner != "local" and (parts > 1 or config.run.cluster is not None)


class WorkerPool:
    """The workers of one stage; a context manager.

    Raises ConfigError if the runner's package is not installed, its cluster does not answer, or the
    store is in this process's memory.
    """

    def __init__(
        self, config: PipelineConfig, store_url: str, *, uses_gpu: bool, need: int | None = None
    ) -> None:
        """`need` is the number of GPUs of a worker, by default the engine's."""
        run, engine, gpus = config.run, config.completions.engine, _gpus()
        if store_url.startswith("memory://"):
            raise ConfigError(
                f"run.runner {run.runner}: workers cannot see a memory:// store; use another store"
            )
        self.kind, self.cluster = run.runner, run.cluster
        self.gpus_per_worker = 0
        if uses_gpu and run.gpus_per_worker is not None:
            self.gpus_per_worker = run.gpus_per_worker
        elif uses_gpu and gpus:
            self.gpus_per_worker = engine.gpus if need is None else need
        default = len(gpus) // self.gpus_per_worker if self.gpus_per_worker else os.cpu_count() or 1
        self.count = run.workers or (0 if run.cluster else max(1, default))
        local = self.kind != "ray" and run.cluster is None
        if local and gpus and self.count * self.gpus_per_worker > len(gpus):
            raise ConfigError(
                f"run.workers: {self.count} workers of {self.gpus_per_worker} GPUs each do not fit the {len(gpus)} GPUs "
                "that are visible here; lower run.workers or run.gpus_per_worker"
            )
        self.setup = WorkerSetup(
            self.kind,
            session=secrets.token_hex(8),
            driver=os.getpid() if local else 0,
            gpus=gpus if local else (),
            gpus_per_worker=self.gpus_per_worker,
        )
        self._stack = ExitStack()
        self._runner: Any = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._close(kill=error is not None)

    def group_size(self, parts: int, maximum: int) -> int:
        """Parts of one group: fewer than `maximum` if there would not be enough groups for all
        workers."""
        return max(1, min(maximum, math.ceil(parts / (_GROUPS_PER_WORKER * self.count))))

    def run(
        self, task: Any, calls: Iterable[T], arguments: Callable[[T], dict[str, Any]]
    ) -> Iterator[tuple[T, Any]]:
        """Yield each call with the task's result, as they end. Takes more calls while earlier ones
        run.

        Raises what a task raises, and EngineError if workers keep dying.
        """
        coming, lost = iter(calls), deque[T]()
        running: dict[PrefectFuture[Any], T] = {}
        deaths = 0
        while True:
            while len(running) < _GROUPS_PER_WORKER * self.count:
                call = lost.popleft() if lost else next(coming, None)
                if call is None:
                    break
                running[self._runner.submit(task, parameters=arguments(call))] = call
            if not running:
                return
            done = next(as_completed(list(running)))
            call = running.pop(done)
            try:
                result = done.result()
            except Exception as error:
                if type(error).__name__ not in _WORKER_DIED:
                    raise
                deaths += 1
                # Dask and Ray have tried this often themselves
                if deaths > _MAX_DEATHS or not isinstance(error, BrokenProcessPool):
                    raise EngineError(
                        f"the workers of one group of parts died {_MAX_DEATHS + 1} times in a row ({type(error).__name__}; the "
                        "system kills them when memory runs out): give them more memory, or lower run.workers. Committed "
                        "parts are kept"
                    ) from error
                lost.extend([call, *running.values()])
                running.clear()
                self._close(kill=True)
                self._open()
            else:
                deaths = 0
                yield call, result

    def _open(self) -> None:
        try:
            self._runner = {
                "process": lambda: ProcessPoolTaskRunner(max_workers=self.count),
                "dask": self._dask,
                "ray": self._ray,
            }[self.kind]()
            self._stack.enter_context(self._runner)
            if not self.count:
                self.count = self._cluster_workers()
        except ImportError as error:
            raise ConfigError(
                f"run.runner is {self.kind}, which is not installed ({error}): `pip install 'qrpo-pipeline[{self.kind}]'`"
            ) from None
        except OSError as error:  # TimeoutError and ConnectionError are OSErrors
            if self.cluster is None:
                raise
            message = f"run.cluster: no {self.kind} cluster answers at {self.cluster}: {error}"
            if self.kind == "ray" and "RAY_AUTH_MODE" not in os.environ:
                message += "; a cluster with a token needs RAY_AUTH_MODE=token here, and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            raise ConfigError(message) from None
        if not self.count:
            raise ConfigError(f"run.cluster: the {self.kind} cluster at {self.cluster} has no workers yet")

    def _dask(self) -> TaskRunner[Any]:
        from prefect_dask.task_runners import DaskTaskRunner

        if self.cluster is not None:
            return DaskTaskRunner(address=self.cluster)
        # no memory limit: Dask does not see the memory of a worker's child processes
        local = {"n_workers": self.count, "threads_per_worker": 1, "memory_limit": 0}
        return DaskTaskRunner(cluster_kwargs={**local, "dashboard_address": None})

    def _ray(self) -> TaskRunner[Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        runner: Any = import_module("prefect_ray.task_runners").RayTaskRunner
        remote_options: Any = import_module("prefect_ray.context").remote_options
        # by default a GPU worker lives for one task, and each group would start its engine again
        self._stack.enter_context(remote_options(num_cpus=1, num_gpus=self.gpus_per_worker, max_calls=0))
        local = {"num_cpus": self.count, "include_dashboard": False} if self.cluster is None else {}
        options = {"log_to_driver": False, "logging_level": "error", **local}
        opened: TaskRunner[Any] = runner(address=self.cluster or "local", init_kwargs=options)
        return opened

    def _cluster_workers(self) -> int:
        if self.kind == "dask":
            return sum(self._runner.client.nthreads().values())
        resources = import_module("ray").cluster_resources()
        kind = "GPU" if self.gpus_per_worker else "CPU"
        return int(resources.get(kind, 0) // (self.gpus_per_worker or 1))

    def _close(self, kill: bool) -> None:
        if self.kind == "dask" and self.cluster is not None and self._runner is not None:
            self._runner.client.run(_end_session, self.setup.session)
        if kill and self.kind == "process":
            for process in multiprocessing.active_children():  # the pool would wait for the end of its groups
                process.kill()
        self._runner = None
        self._stack.close()


def _gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name for name in visible.split(",") if name)
    return tuple(str(number) for number in range(len(glob("/dev/nvidia[0-9]*"))))
