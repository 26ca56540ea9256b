"""A Prefect server of our own, where none is running: started beside the work, and gone with it.

Prefect's own ephemeral server outlives a killed flow and loses records at exit. This one runs in a child process that ends when
this process does, however that happens. Its database is Prefect's usual one, so past runs stay visible to a later `prefect server start`.
"""

import atexit
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

from qrpo.errors import EngineError
from qrpo.processes.child import Child

__all__ = ["PrefectServer", "open_server", "start_server"]

_STARTUP_SECONDS = 180.0


def start_server() -> Callable[[], object]:
    """Use the Prefect server that PREFECT_API_URL names, else start one and point PREFECT_API_URL at it.

    Call it before Prefect is imported, for Prefect reads its settings then; the import goes on while the server starts. What is
    returned waits until the server answers, and raises EngineError where it does not.
    """
    if "PREFECT_API_URL" in os.environ:
        return lambda: None
    return open_server("127.0.0.1", _free_port())[1]


def open_server(
    host: str, port: int, *, services: bool = False, log: Path | None = None
) -> tuple[Child, Callable[[], object]]:
    """Start a server and point PREFECT_API_URL at it; the child that it runs in, and what waits until it answers.

    `services` are those that make a server of it which others use: the scheduler, automations, the UI.
    """
    server = Child(
        "flows.service.server:PrefectServer", host, port, services, name="the Prefect server", log=log
    )
    atexit.register(server.close)  # registered before Prefect's own clean-up, hence run after it
    os.environ["PREFECT_API_URL"] = f"http://{_reachable(host)}:{port}/api"
    starting = ThreadPoolExecutor(1).submit(server.call, "wait")
    return server, starting.result


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PrefectServer:
    """Lives in the child process: the server in a thread."""

    def __init__(self, host: str, port: int, services: bool) -> None:
        os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        os.environ.setdefault("PREFECT_SERVER_UI_API_URL", "/api")  # by whatever name a browser reached it
        import uvicorn
        from prefect.server.api.server import create_app

        self._health = f"http://{_reachable(host)}:{port}/api/health"
        app = create_app(ephemeral=not services)
        self._server = uvicorn.Server(
            uvicorn.Config(app, host=host, port=port, log_level="error", lifespan="on")
        )
        self._thread = threading.Thread(target=self._server.run, name="prefect-server", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return once the API answers."""
        deadline = time.monotonic() + _STARTUP_SECONDS
        while time.monotonic() < deadline and self._thread.is_alive():
            try:
                with urllib.request.urlopen(self._health, timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.1)
        raise EngineError(
            f"the Prefect server did not answer at {self._health} within {_STARTUP_SECONDS:.0f} s"
        )

    def close(self) -> None:
        """Stop in order: what is queued is written first."""
        self._server.should_exit = True
        self._thread.join(timeout=4)
