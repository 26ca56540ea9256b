"""`qrpo serve`: a Prefect server, the deployments, their schedule and a worker, in one command on one machine.

Server and worker are child processes that end with this process. Ctrl-C cancels the current runs: their finished parts are kept,
their engines are shut down, and the next run continues from there.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console

from flows.service.logs import log_path
from flows.service.server import open_server
from qrpo.errors import ConfigError, EngineError
from qrpo.processes.child import Child
from storage import Store
from tasks.config import PipelineConfig

__all__ = ["serve", "serving_lines"]

_STOP_SECONDS = 15.0  # for cancelled runs to end


class PoolWorker:
    """A Prefect process worker of one work pool, in a child process."""

    def run(self, pool: str) -> None:
        """Run what the pool schedules until this process ends."""
        import asyncio

        from prefect.workers.process import ProcessWorker

        asyncio.run(ProcessWorker(pool, name=f"qrpo serve on {socket.gethostname()}").start())


def serve(
    config: PipelineConfig,
    store_url: str,
    *,
    host: str,
    port: int,
    console: Console,
    ready: Callable[[dict[str, Any]], None],
    **options: Any,
) -> None:
    """Serve until interrupted, with the server that PREFECT_API_URL names or a new one at `host` and `port`.

    `options` are fields of `DeployOptions`. The runs use a work pool of this machine. Calls `ready` with the object that `--json`
    prints. Raises ConfigError if the port is in use, EngineError if the worker ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM comes from a service manager
        signal.signal(number, signal.default_int_handler)
    logs = log_path(Store(store_url), "serve/worker.log").parent
    server: Child | None = None
    if "PREFECT_API_URL" not in os.environ:
        _check_port(host, port)
        console.print("starting the Prefect server ...")
        server, wait_for_server = open_server(host, port, services=True, log=logs / "server.log")
        wait_for_server()
    from flows.service.deploy import DeployOptions, deploy

    console.print("deploying the flows ...")
    pool = f"qrpo-{socket.gethostname()}"
    deployed = deploy(config, store_url, DeployOptions(pool=pool, **options))
    worker = Child("flows.service.serve:PoolWorker", name="the worker", log=logs / "worker.log")
    working = threading.Thread(target=_work, args=(worker, pool), name="worker", daemon=True)
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
        if cancelled := _end(worker, pool):
            console.print(f"cancelled {', '.join(cancelled)}; finished parts are kept")
        if server is not None:
            server.close()


def _work(worker: Child, pool: str) -> None:
    with suppress(EngineError):  # `_end` kills it; if it failed, its log has the reason
        worker.call("run", pool)


def serving_lines(served: dict[str, Any]) -> list[str]:
    """What is served, as text."""
    url, schedule = served["url"], served["schedule"]
    return [
        f"serving {len(served['deployments'])} deployments of run {served['run']} at {url}/deployments",
        *([f"scheduled: pipeline/pipeline at {schedule}"] if schedule else []),
        f"start a run in the browser, or with:  PREFECT_API_URL={url}/api prefect deployment run pipeline/pipeline",
        f"logs: {served['logs']}",
        "press Ctrl-C to stop",
    ]


def _end(worker: Child, pool: str) -> list[str]:
    """Cancel the runs of this pool, wait some seconds for them, then kill the worker's process group; return the runs' names."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import Cancelled, Cancelling

    def runs(*states: str) -> list[FlowRun]:
        body = {
            "flow_runs": {"state": {"type": {"any_": states}}},
            "work_pools": {"name": {"any_": [pool]}},
        }
        found = client.request("POST", "/flow_runs/filter", json=body).json()
        return [FlowRun.model_validate(run) for run in found]

    message = "`qrpo serve` ended; committed parts are kept."
    names: list[str] = []
    try:
        with get_client(sync_client=True) as client:
            for run in runs("RUNNING", "PENDING"):
                client.set_flow_run_state(run.id, Cancelling(message=message))
                names.append(run.name)
            deadline = time.monotonic() + _STOP_SECONDS
            while time.monotonic() < deadline and runs("CANCELLING"):
                time.sleep(0.5)
            worker.close()
            for run in runs("CANCELLING"):  # they had not begun, or did not react
                client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
    except httpx.HTTPError:
        pass  # the server is already gone
    finally:
        worker.close()
    return names


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port} cannot be used: {error.strerror}. Choose another port, or set "
                "PREFECT_API_URL to a Prefect server that is already running"
            ) from None
