"""A Prefect server in a child process that ends with this process, even after kill -9.

Prefect's own ephemeral server survives a killed flow and loses records at exit. The database is Prefect's default one, so a
later `prefect server start` still shows past runs.
"""

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qrpo.errors import EngineError
from qrpo.processes.child import Child

__all__ = ["open_server", "start_server"]

_STARTUP_SECONDS = 180.0


def start_server() -> Callable[[], object]:
    """Use the Prefect server that PREFECT_API_URL names; without one, start a server and set PREFECT_API_URL.

    Call it before you import Prefect, which reads its settings at import. The import then overlaps with the server's start. The
    returned function waits until the server answers; it raises EngineError if the server does not start.
    """
    if "PREFECT_API_URL" in os.environ:
        return lambda: None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return open_server("127.0.0.1", port)[1]


def open_server(
    host: str, port: int, *, services: bool = False, log: Path | None = None
) -> tuple[Child, Callable[[], object]]:
    """Start a server and set PREFECT_API_URL; return its child process and a function that waits until it answers.

    `services` adds what a shared server needs: the scheduler, automations, the UI.
    """
    server = Child(
        "flows.service.server:PrefectServer", host, port, services, name="the Prefect server", log=log
    )
    atexit.register(server.close)  # registered before Prefect's own clean-up, so it runs after it
    address = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    os.environ["PREFECT_API_URL"] = f"http://{address}:{port}/api"
    started = ThreadPoolExecutor(1).submit(server.call, "wait")
    return server, started.result


class PrefectServer:
    """The server, in a thread of the child process."""

    def __init__(self, host: str, port: int, services: bool) -> None:
        os.environ.setdefault("PREFECT_SERVER_UI_API_URL", "/api")  # works under any host name
        import uvicorn
        from prefect.server.api.server import create_app

        app = create_app(ephemeral=not services)
        settings = uvicorn.Config(app, host=host, port=port, log_level="error", lifespan="on")
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, name="prefect-server", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the server accepts requests."""
        deadline = time.monotonic() + _STARTUP_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise EngineError(f"the Prefect server did not start within {_STARTUP_SECONDS:.0f} s")
            time.sleep(0.05)

    def close(self) -> None:
        """Write what is queued, then stop."""
        self._server.should_exit = True
        self._thread.join(timeout=4)
