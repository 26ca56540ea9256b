"""A Prefect server in a child process that ends with this process, even after kill -9.

Prefect's own ephemeral server survives a killed flow and loses records at exit. The database is
Prefect's default one, so a later `prefect server start` still shows past runs.

Whoever reaches the server can run code, and every web page reaches 127.0.0.1. So the server demands
a login, which is new at each start unless PREFECT_SERVER_API_AUTH_STRING is set. It also demands
Prefect's CSRF token, allows no other origin, and refuses requests for host names that are not its
own.
"""

import atexit
import os
import secrets
import socket
import threading
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from qrpo.errors import ConfigError, EngineError
from qrpo.processes.child import Child

_STARTUP_SECONDS = 180.0


def server_is_named() -> bool:
    """Whether PREFECT_API_URL names a server; it is set to that of the active Prefect profile if it
    is missing.

    Without an import of Prefect, which reads its settings at import.
    """
    path = Path(os.path.expanduser(os.environ.get("PREFECT_HOME") or "~/.prefect"), "profiles.toml")
    if "PREFECT_API_URL" not in os.environ and path.is_file():
        try:
            profiles = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is no TOML: {error}. Fix it, or set PREFECT_API_URL") from None
        name = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
        if url := profiles.get("profiles", {}).get(name, {}).get("PREFECT_API_URL"):
            os.environ["PREFECT_API_URL"] = url
    return "PREFECT_API_URL" in os.environ


def start_server() -> Callable[[], object]:
    """Use the Prefect server that PREFECT_API_URL or the active profile names; without one, start a
    server and point this process to it.

    Call it before you import Prefect, which reads its settings at import. The import then overlaps
    with the server's start. The returned function waits until the server answers; it raises
    EngineError if the server does not start.
    """
    if server_is_named():
        return lambda: None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return open_server("127.0.0.1", port)[1]


def open_server(
    host: str, port: int, *, services: bool = False, log: Path | None = None
) -> tuple[Child, Callable[[], object]]:
    """Start a server; set PREFECT_API_URL and PREFECT_API_AUTH_STRING. Returns its child process
    and a function that waits until it answers.

    `services` adds what a shared server needs: the scheduler, automations, the UI.
    """
    address = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{address}:{port}"
    login = os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or f"qrpo:{secrets.token_urlsafe(24)}"
    environment = {
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": url,
        "PREFECT_SERVER_UI_API_URL": "/api",  # works under any host name
    }
    target = "flows.service.server:PrefectServer"
    server = Child(target, host, port, services, name="the Prefect server", log=log, env=environment)
    atexit.register(server.close)  # registered before Prefect's own clean-up, so it runs after it
    os.environ.update(PREFECT_API_URL=f"{url}/api", PREFECT_API_AUTH_STRING=login)
    started = ThreadPoolExecutor(1).submit(server.call, "wait")
    return server, started.result


def own_names(host: str) -> list[str]:
    """The names and addresses under which a browser or worker may ask a server that listens on
    `host`."""
    names = {
        "localhost",
        "127.0.0.1",
        host.partition(":")[0] or "[",
    }  # "[": what is before the first colon of [::1]
    if host in ("0.0.0.0", "::"):
        own = socket.gethostname()
        names |= {own, socket.getfqdn()}
        with suppress(OSError):
            names |= {str(found[4][0]) for found in socket.getaddrinfo(own, None, socket.AF_INET)}
    return sorted(names)


class PrefectServer:
    """The server, in a thread of the child process."""

    def __init__(self, host: str, port: int, services: bool) -> None:
        import uvicorn
        from prefect.server.api.server import create_app
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        app = TrustedHostMiddleware(create_app(ephemeral=not services), own_names(host), www_redirect=False)
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
