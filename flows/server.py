"""A Prefect server for one run, where none is running: started beside the work, and gone with it.

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
from urllib.error import URLError

from qrpo.child import Child
from qrpo.errors import EngineError

__all__ = ["PrefectServer", "start_server"]

_STARTUP_SECONDS = 180.0


def start_server() -> Callable[[], object]:
    """Use the Prefect server that PREFECT_API_URL names, else start one and point PREFECT_API_URL at it.

    Call it before Prefect is imported, for Prefect reads its settings then; the import goes on while the server starts. What is
    returned waits until the server answers, and raises EngineError where it does not.
    """
    if "PREFECT_API_URL" in os.environ:
        return lambda: None
    port = _free_port()
    server = Child("flows.server:PrefectServer", port, name="the Prefect server")
    atexit.register(server.close)  # registered before Prefect's own clean-up, hence run after it
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    starting = ThreadPoolExecutor(1).submit(server.call, "wait")
    return starting.result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PrefectServer:
    """Lives in the child process: the server in a thread, on a free port of the loopback interface."""

    def __init__(self, port: int) -> None:
        os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        import uvicorn
        from prefect.server.api.server import create_app

        self._health = f"http://127.0.0.1:{port}/api/health"
        app = create_app(ephemeral=True)
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="on")
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
