"""The server of `qrpo browse`: GET alone, to this machine alone unless a token opens it wider, under headers that let nothing run.

The page holds text that models wrote. It is escaped in the templates; should that ever fail, the Content-Security-Policy
has no source for scripts, frames, fonts or connections, and style sheets and the icon only from here.
"""

import hmac
import secrets
import socket
from collections.abc import Callable
from importlib.resources import files
from ipaddress import ip_address
from urllib.parse import parse_qsl, urlencode

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.views.browse.pages import NotFoundError, Pages, TidierAddressError, View
from flows.views.inspect.text import INVISIBLE
from flows.views.inspect.text import escape as written_out
from flows.views.show import size_text
from qrpo.errors import ConfigError, QRPOError
from storage import Store, StoreError, UnsafeNameError

__all__ = ["Guard", "browse_app", "serve"]

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
_MOST_TEXT = 100_000  # characters of one text on a page


def serve(store: Store, *, host: str, port: int, token: str | None, say: Callable[[str], None]) -> None:
    """Serve until interrupted; `say` gets the address. Any host but loopback gets a token, made up where none is given."""
    local = _is_loopback(host)
    if not local and token is None:
        token = secrets.token_urlsafe(24)
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; --port 0 takes a free one"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    say(f"{store.url} at {address}  (read-only; Ctrl-C ends it)")
    app = Guard(browse_app(store), token=token, hosts=_LOOPBACK if local else None)
    config = uvicorn.Config(app, log_level="warning", server_header=False, access_log=False, lifespan="off")
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def browse_app(store: Store) -> Starlette:
    """The pages as an application, without a guard."""
    pages = Pages(store)
    templates = _templates(store)

    def shown(make: Callable[[Request], View]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            status = 200
            try:
                name, values = make(request)
            except TidierAddressError as error:
                return RedirectResponse(error.address, 303)
            except (NotFoundError, UnsafeNameError) as error:
                status, name, values = 404, "error.html", {"message": str(error)}
            except (QRPOError, StoreError) as error:
                status, name, values = 500, "error.html", {"message": str(error)}
            return HTMLResponse(templates.get_template(name).render(values), status)

        return answer

    def artifact(make: Callable[..., View], *, asks: bool = True) -> Callable[[Request], View]:
        def view(request: Request) -> View:
            named = request.path_params
            place = pages.place(named.get("run"), named["stage"], named.get("fingerprint"))
            return make(place, request.query_params) if asks else make(place)

        return view

    def row(request: Request) -> View:
        named = request.path_params
        place = pages.place(named.get("run"), named["stage"], named.get("fingerprint"))
        return pages.row(place, named["position"])

    views: dict[str, Callable[[Request], View]] = {
        "/": lambda request: pages.home(),
        "/artifacts": lambda request: pages.artifacts(),
        "/compare": lambda request: pages.compare(request.query_params),
        "/compare/{prompt_id}": lambda request: pages.compare_prompt(
            request.path_params["prompt_id"], request.query_params
        ),
        "/prompt/{run}/{prompt_id}": lambda request: pages.prompt(
            request.path_params["run"], request.path_params["prompt_id"]
        ),
        "/runs/{run}": lambda request: pages.run(request.path_params["run"]),
    }
    for base in ("/runs/{run}/{stage}", "/artifacts/{stage}/{fingerprint}"):
        views |= {
            base: artifact(pages.rows),
            f"{base}/numbers": artifact(pages.numbers),
            f"{base}/rejects": artifact(pages.rejects),
            f"{base}/origin": artifact(pages.origin, asks=False),
            f"{base}/row/{{position:int}}": row,
        }
    routes = [Route(path, shown(make), methods=["GET"]) for path, make in views.items()]
    routes += [
        Route(f"/static/{name}", _static(name, kind), methods=["GET"]) for name, kind in _STATIC.items()
    ]

    def nowhere(request: Request) -> View:
        raise NotFoundError("there is no such page")

    def lost(request: Request, error: Exception) -> Response:
        return shown(nowhere)(request)

    return Starlette(routes=routes, exception_handlers={404: lost})


class Guard:
    """Before the pages: methods, the host's name (so that no other site's name leads here), the token; after them: headers."""

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: tuple[str, ...] | None) -> None:
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        await (self._refusal(scope) or self.app)(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["method"] not in ("GET", "HEAD"):
            return _plain("this page is read-only", 405)
        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts is not None and name not in self.hosts:
            return _plain("this server answers to its own name alone", 421)
        if self.token is None:
            return None
        request = Request(scope)
        given = request.query_params.get("token")
        if given is not None and hmac.compare_digest(given.encode(), self.token.encode()):
            kept = [
                (key, value) for key, value in parse_qsl(scope["query_string"].decode()) if key != "token"
            ]
            # a path that begins with two slashes would name another host
            path = "/" + request.url.path.lstrip("/")
            answer = RedirectResponse(path + (f"?{urlencode(kept)}" if kept else ""), 303)
            answer.set_cookie(_COOKIE, self.token, httponly=True, samesite="lax")
            return answer
        if hmac.compare_digest(request.cookies.get(_COOKIE, "").encode(), self.token.encode()):
            return None
        return _plain("open the address with its token, as `qrpo browse` printed it", 401)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(_HEADERS)
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return sending


def _templates(store: Store) -> Environment:
    made = Environment(
        loader=PackageLoader("flows.views.browse"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["store_url"] = store.url
    made.filters |= {"size": size_text, "shown": _shown, "short": lambda text: text[:12], "real": _real}
    return made


def _shown(value: object, most: int = _MOST_TEXT) -> Markup:
    """Any text, with what is invisible or commanding written out and marked as such."""
    text = str(value)
    parts, at = [], 0
    for found in INVISIBLE.finditer(text[:most]):
        parts.append(escape(text[at : found.start()]))
        parts.append(Markup('<span class="control">{}</span>').format(written_out(found.group())))
        at = found.end()
    parts.append(escape(text[at:most]))
    if len(text) > most:
        parts.append(Markup('<span class="cut"> ... {} characters in all</span>').format(f"{len(text):,}"))
    return Markup("").join(parts)


def _real(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value + 0.0:.{digits}g}"


def _static(name: str, kind: str) -> Callable[[Request], Response]:
    content = files("flows.views.browse").joinpath("static", name).read_bytes()
    return lambda request: Response(content, media_type=kind, headers={"cache-control": "max-age=3600"})


def _plain(text: str, status: int) -> Response:
    return Response(text + "\n", status, media_type="text/plain")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
