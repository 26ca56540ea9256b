"""`qrpo serve`: a Prefect server, the deployments, their schedule and a worker, all in one command on one machine.

Server and worker live in child processes that end with this one, however it ends. Ctrl-C cancels the runs that are going on:
their finished parts stay, their engines are shut down, and the next run goes on from there.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.service.server import open_server
from qrpo.errors import ConfigError, EngineError
from qrpo.processes.child import Child
from storage import Store
from storage.read import cache_folder
from tasks.config import PipelineConfig

__all__ = ["PoolWorker", "serve", "serving_lines"]

_LONGEST_STOP = 15.0  # seconds for runs to end after they were cancelled


class PoolWorker:
    """Lives in a child process: a Prefect process worker of one work pool."""

    def run(self, pool: str) -> None:
        """Take runs from the pool until this process ends."""
        import asyncio

        from prefect.workers.process import ProcessWorker

        asyncio.run(ProcessWorker(pool, name=f"qrpo serve on {socket.gethostname()}").start())


def serve(
    config: PipelineConfig,
    store_url: str,
    *,
    cron: str | None,
    timezone: str,
    host: str,
    port: int,
    gpus: int,
    notify: str | None,
    console: Console,
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """Serve until interrupted. Uses the server that PREFECT_API_URL names, else starts one at `host` and `port`.

    Runs happen in a work pool of this machine's own. `ready` is told once what is served, and where. Raises ConfigError where
    the port is taken, EngineError where the worker ends by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a service manager ends it as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    logs = _log_folder(Store(store_url))
    server: Child | None = None
    if "PREFECT_API_URL" not in os.environ:
        _check_port(host, port)
        console.print("starting the Prefect server ...")
        server, answers = open_server(host, port, services=True, log=logs / "server.log")
        answers()
    from flows.service.deploy import DeployOptions, deploy

    console.print("deploying the flows ...")
    options = DeployOptions(
        pool=f"qrpo-{socket.gethostname()}", cron=cron, timezone=timezone, gpus=gpus, notify=notify
    )
    deployed = deploy(config, store_url, options)
    worker = Child("flows.service.serve:PoolWorker", name="the worker", log=logs / "worker.log")
    working = threading.Thread(target=_work, args=(worker, options.pool), name="worker", daemon=True)
    working.start()
    url = os.environ["PREFECT_API_URL"].removesuffix("/api")
    ready({**deployed, "url": url, "logs": str(logs)})
    try:
        while working.is_alive():
            working.join(timeout=1.0)
        raise EngineError(f"the worker ended; its log: {logs / 'worker.log'}")
    except KeyboardInterrupt:
        console.print("ending ...")
    finally:
        if cancelled := _end(worker, options.pool):
            console.print(f"cancelled {', '.join(cancelled)}; finished parts are kept")
        if server is not None:
            server.close()


def _work(worker: Child, pool: str) -> None:
    with suppress(EngineError):  # it is ended from outside; why it ended by itself stands in its log
        worker.call("run", pool)


def serving_lines(served: dict[str, Any]) -> list[str]:
    """What is served, as a person reads it."""
    url, schedule = served["url"], served["schedule"]
    return [
        f"serving {len(served['deployments'])} deployments of run {served['run']} at {url}/deployments",
        *([f"scheduled: pipeline/pipeline at {schedule}"] if schedule else []),
        f"start one:  prefect deployment run pipeline/pipeline   (PREFECT_API_URL={url}/api), or in the browser",
        f"logs: {served['logs']}",
        "Ctrl-C ends it",
    ]


def _end(worker: Child, pool: str) -> list[str]:
    """Cancel what runs in this pool, give it some seconds to end, then end the worker and all below it; the runs' names."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.objects import FlowRun, StateType
    from prefect.states import Cancelled, Cancelling

    def going_on(*types: StateType) -> list[FlowRun]:
        return client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": list(types)}}}),
            work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}}),
        )

    message = "`qrpo serve` was ended; what was committed is kept."
    names: list[str] = []
    try:
        with get_client(sync_client=True) as client:
            for run in going_on(StateType.RUNNING, StateType.PENDING):
                client.set_flow_run_state(run.id, Cancelling(message=message))
                names.append(run.name)
            deadline = time.monotonic() + _LONGEST_STOP
            while time.monotonic() < deadline and going_on(StateType.CANCELLING):
                time.sleep(0.5)
            worker.close()
            for run in going_on(StateType.CANCELLING):  # they had not begun, or did not listen
                client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
    except httpx.HTTPError:
        pass  # the server is gone already, and with it whoever could be asked
    finally:
        worker.close()
    return names


def _log_folder(store: Store) -> Path:
    folder = store.local_path("logs/serve") or cache_folder() / "logs" / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port} cannot be used: {error.strerror}. Choose another port, or set "
                "PREFECT_API_URL where a Prefect server runs already"
            ) from None
