"""The server of `qrpo browse`: GET only, to who has the token, with headers that let nothing run.

The pages hold text that models wrote. The templates escape it. If that ever failed, the
Content-Security-Policy allows no script, frame, font or connection, and style sheets and the icon
only from this server.
"""

import hmac
import secrets
import socket
from collections.abc import Callable
from importlib.resources import files
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, urlencode

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.views.browse.pages import NotFoundError, Pages, View
from flows.views.runs import size_text
from flows.views.text import INVISIBLE
from flows.views.text import escape as written_out
from qrpo.errors import ConfigError, QRPOError
from storage import Store, StoreError, UnsafeNameError

_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_COOKIE = "qrpo_browse"
_STATIC = {"style.css": "text/css", "icon.svg": "image/svg+xml"}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_SHORTEST_TOKEN, _MAX_ADDRESS = 16, 8192  # characters
_MAX_TEXT = 100_000  # characters of one text on a page


def serve(store: Store, *, host: str, port: int, token: str | None, say: Callable[[str], None]) -> None:
    """Serve until interrupted; `say` gets the address with its token, which is generated if
    missing."""
    if token is not None and len(token) < _SHORTEST_TOKEN:
        raise ConfigError(
            f"--token has {len(token)} characters, expected at least {_SHORTEST_TOKEN}: without the option one is generated"
        )
    token = token or secrets.token_urlsafe(24)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; --port 0 takes a free one"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/" + f"?{urlencode({'token': token})}"
    say(f"{store.url} at {address}  (read-only; Ctrl-C ends it)")
    app = Guard(browse_app(store), token=token, hosts=_LOOPBACK if _is_loopback(host) else None)
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        access_log=False,
        lifespan="off",
        limit_concurrency=64,
        h11_max_incomplete_event_size=2 * _MAX_ADDRESS,
    )
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def browse_app(store: Store) -> Starlette:
    """The pages as an application, without a guard."""
    pages, templates = Pages(store), _templates(store)

    def html(name: str, values: dict[str, Any], status: int = 200) -> Response:
        return HTMLResponse(templates.get_template(name).render(values), status)

    def endpoint(view: Callable[[Request], View]) -> Callable[[Request], Response]:
        return lambda request: html(*view(request))

    def failure(status: int, message: str = "") -> Callable[[Request, Exception], Response]:
        return lambda request, error: html("error.html", {"message": message or str(error)}, status)

    views = {
        "/": pages.home,
        "/artifacts": pages.artifacts,
        "/compare": pages.compare,
        "/compare/{prompt_id}": pages.compare_prompt,
        "/prompt/{run}/{prompt_id}": pages.prompt,
        "/runs/{run}": pages.run,
    }
    for base in ("/runs/{run}/{stage}", "/artifacts/{stage}/{fingerprint}"):
        views |= {
            base: pages.rows,
            f"{base}/numbers": pages.numbers,
            f"{base}/rejects": pages.rejects,
            f"{base}/origin": pages.origin,
            f"{base}/row/{{position:int}}": pages.row,
        }
    routes = [Route(path, endpoint(view), methods=["GET"]) for path, view in views.items()]
    routes += [
        Route(f"/static/{name}", _static(name, kind), methods=["GET"]) for name, kind in _STATIC.items()
    ]
    handlers: dict[Any, Any] = {
        404: failure(404, "there is no such page"),
        NotFoundError: failure(404),
        UnsafeNameError: failure(404),
        StoreError: failure(500),
        QRPOError: failure(500),
    }
    return Starlette(routes=routes, exception_handlers=handlers)


class Guard:
    """Checks the method, the host's name (against DNS rebinding), the token and the origin of each
    request, and adds the headers."""

    def __init__(self, app: ASGIApp, *, token: str, hosts: tuple[str, ...] | None) -> None:
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        if scope["type"] == "http":
            await (self._refusal(scope) or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("this page is read-only\n", 405)
        headers = Headers(scope=scope)
        if len(scope["raw_path"]) + len(scope["query_string"]) > _MAX_ADDRESS:
            return PlainTextResponse(f"an address has at most {_MAX_ADDRESS} characters\n", 414)
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts is not None and name not in self.hosts:
            return PlainTextResponse("this server only answers requests for its own name\n", 421)
        request = Request(scope)
        given = request.query_params.get("token")
        if given is not None and hmac.compare_digest(given.encode(), self.token.encode()):
            pairs = parse_qsl(scope["query_string"].decode())
            kept = [(key, value) for key, value in pairs if key != "token"]
            # a path that begins with two slashes would name another host
            path = "/" + request.url.path.lstrip("/")
            answer = RedirectResponse(path + (f"?{urlencode(kept)}" if kept else ""), 303)
            answer.set_cookie(_COOKIE, self.token, httponly=True, samesite="lax")
            return answer
        if (
            headers.get("sec-fetch-site", "none") == "cross-site"
        ):  # a page elsewhere must not start searches here
            return PlainTextResponse("open this page from its own address\n", 403)
        if hmac.compare_digest(request.cookies.get(_COOKIE, "").encode(), self.token.encode()):
            return None
        return PlainTextResponse("open the address with its token, as `qrpo browse` printed it\n", 401)


def _templates(store: Store) -> Environment:
    environment = Environment(
        loader=PackageLoader("flows.views.browse"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["store_url"] = store.url
    environment.filters |= {
        "size": size_text,
        "shown": _shown,
        "short": lambda text: text[:12],
        "real": lambda value, digits=4: "" if value is None else f"{value + 0.0:.{digits}g}",
        "thousands": lambda value: f"{value:,}",
    }
    return environment


def _shown(value: object, limit: int = _MAX_TEXT) -> Markup:
    """Any text, escaped, with invisible and control characters written out and marked."""
    text = str(value)
    parts, at = [], 0
    for found in INVISIBLE.finditer(text[:limit]):
        parts.append(escape(text[at : found.start()]))
        parts.append(Markup('<span class="control">{}</span>').format(written_out(found.group())))
        at = found.end()
    parts.append(escape(text[at:limit]))
    if len(text) > limit:
        parts.append(Markup('<span class="cut"> ... {} characters in all</span>').format(f"{len(text):,}"))
    return Markup("").join(parts)


def _static(name: str, kind: str) -> Callable[[Request], Response]:
    content = files("flows.views.browse").joinpath("static", name).read_bytes()
    return lambda request: Response(content, media_type=kind, headers={"cache-control": "max-age=3600"})


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
