"""`qrpo serve`: a Prefect server, the deployments, their schedule and a worker, in one command on
one machine.

Server and worker are child processes that end with this process. Ctrl-C cancels the current runs:
their finished parts are kept, their engines are shut down, and the next run continues from there.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from flows.service.logs import log_path
from flows.service.server import open_server, server_is_named
from qrpo.errors import ConfigError, EngineError
from qrpo.processes.child import Child
from storage import Store
from tasks.config import PipelineConfig

log = logging.getLogger("qrpo")


class PoolWorker:
    """A Prefect process worker of one work pool, in a child process."""

    def run(self, pool: str) -> None:
        """Run what the pool schedules until this process ends."""
        from prefect.workers.process import ProcessWorker

        asyncio.run(ProcessWorker(pool, name=f"qrpo serve on {socket.gethostname()}").start())


def serve(
    config: PipelineConfig,
    store: Store,
    *,
    host: str,
    port: int,
    ready: Callable[[dict[str, Any]], None],
    **options: Any,
) -> None:
    """Serve until interrupted, with the server that PREFECT_API_URL names or a new one at `host`
    and `port`.

    `options` are fields of `DeployOptions`. The runs use a work pool of this machine. Calls `ready`
    with the object that `--json` prints. Raises ConfigError if the port is in use, EngineError if
    the worker ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM comes from a service manager
        signal.signal(number, signal.default_int_handler)
    logs = log_path(store, "serve/worker.log").parent
    with ExitStack() as stack:
        starts_server = not server_is_named()
        if starts_server:
            _check_port(host, port)
            log.info("starting the Prefect server ...")
            server, wait_for_server = open_server(host, port, services=True, log=logs / "server.log")
            stack.callback(server.close)
            wait_for_server()
        # imported now: Prefect reads its settings when it is imported
        from prefect.states import Crashed

        from flows.service.deploy import DeployOptions, deploy
        from flows.service.pool_runs import cancel_runs, changes, end_runs

        log.info("deploying the flows ...")
        pool = f"qrpo-{socket.gethostname()}"
        deployed = deploy(config, store, DeployOptions(pool=pool, **options))
        worker = Child("flows.service.serve:PoolWorker", name="the worker", log=logs / "worker.log")
        working = threading.Thread(target=_work, args=(worker, pool), name="worker", daemon=True)
        if starts_server:  # so no worker is alive that could have runs
            end_runs(pool, Crashed(message="Its worker was killed; committed parts are kept."))
        working.start()
        url = os.environ["PREFECT_API_URL"].removesuffix("/api")
        login = os.environ.get("PREFECT_API_AUTH_STRING")
        ready({**deployed, "url": url, "login": login, "logs": str(logs)})
        shown: dict[UUID, str] = {}
        started = datetime.now(UTC)
        try:
            while working.is_alive():
                working.join(timeout=2.0)
                for line in changes(pool, started, shown):
                    log.info("%s", line)
            raise EngineError(f"the worker ended; its log: {logs / 'worker.log'}")
        except KeyboardInterrupt:
            log.info("ending ...")
        finally:
            if cancelled := cancel_runs(pool, worker):
                log.info("cancelled %s; finished parts are kept", ", ".join(cancelled))


def _work(worker: Child, pool: str) -> None:
    with suppress(EngineError):  # `cancel_runs` kills it; if it failed, its log has the reason
        worker.call("run", pool)


def serving_lines(served: dict[str, Any]) -> list[str]:
    """What is served, as text."""
    url, schedule, name = served["url"], served["schedule"], served["deployments"][0]
    login = served["login"]
    settings = f"PREFECT_API_URL={url}/api" + (f" PREFECT_API_AUTH_STRING={login}" if login else "")
    return [
        f"serving {len(served['deployments'])} deployments of run {served['run']} at {url}/deployments",
        *([f"login in the browser: {login}"] if login else []),
        *([f"scheduled: {name} at {schedule}"] if schedule else []),
        f"start a run in the browser, or with:  {settings} prefect deployment run {name}",
        f"logs: {served['logs']}",
        "press Ctrl-C to stop",
    ]


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
