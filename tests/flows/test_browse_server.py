"""What `qrpo browse` answers to whom, apart from what its pages show."""

import html
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import storage
from flows.views.browse.server import serve as start_browsing
from qrpo.errors import ConfigError
from storage import Store
from tests.support.flows import QRPO, clean_environment, invoke
from tests.support.processes import eventually, running
from tests.support.views import PROMPT, TOKEN, ask, commit, row, serving, table, write_artifacts

SEARCH = "/runs/one/rewards?where=reward+%3E+0"


@pytest.fixture
def serve() -> Iterator[Callable[[Store], int]]:
    """Serve a store; the port."""
    with ExitStack() as stack:
        yield lambda store: stack.enter_context(serving(store))


@pytest.fixture(scope="module")
def memory() -> Store:
    store = Store("memory://browsed/store")
    write_artifacts(store, "one")
    return store


@pytest.fixture(scope="module")
def port(memory: Store) -> Iterator[int]:
    """The port of a server of a store in memory."""
    with serving(memory) as port:
        yield port


def test_pages_of_a_store_that_is_no_folder(port: int) -> None:
    for path, expected in (
        ("/", "one"),
        ("/runs/one/rewards?where=reward+%3E+11&sort=-reward", "5 rows match"),
        ("/runs/one/rewards/numbers", "72 values"),
        ("/prompt/one/5feceb", "6 completions, best reward first"),
    ):
        status, _, body = ask(port, path)
        assert (status, expected in body) == (200, True), path


def test_every_link_leads_to_a_page_that_holds_nothing_to_run(
    tmp_path: Path, snapshot: Callable[[Path], Any], serve: Callable[[Store], int]
) -> None:
    for run, shift in (("one", 0.0), ("two", 1.0)):
        write_artifacts(Store(tmp_path), run, reward_shift=shift)
    before, port = snapshot(tmp_path), serve(Store(tmp_path))
    todo, seen = ["/"], {"/"}
    kinds: set[str] = set()  # addresses that differ in numbers, fingerprints and values alone
    while todo:
        status, _, body = ask(port, todo.pop(0))
        assert (status, body.count("<h1")) == (200, 1)
        assert not re.search(r"<(script|img|iframe|object)\b|\son\w+=\"", body)
        for link in map(html.unescape, re.findall(r'href="(/[^"]*)"', body)):
            kind = re.sub(r"[0-9a-f]{32}|\d+|=[^&]*", "*", link)
            if kind not in kinds and not link.startswith("/static/"):
                kinds.add(kind)
                seen.add(link)
                todo.append(link)
    for link in (
        "/runs/one/completions",
        "/runs/one/rewards/rejects",
        "/runs/one/policy/numbers",
        "/artifacts",
    ):
        assert link in seen
    assert {"/compare", f"/prompt/one/{PROMPT}"} <= seen
    assert len(seen) > 40
    assert snapshot(tmp_path) == before, "looking changes nothing"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        *((method, "/", {}, 405) for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS")),
        ("HEAD", "/", {}, 200),
        ("GET", "/", {"Host": "rebound.example:{port}"}, 421),
        *(("GET", "/", {"Host": name + ":{port}"}, 200) for name in ("localhost", "127.0.0.1", "[::1]")),
        ("GET", SEARCH, {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", SEARCH, {"Sec-Fetch-Site": "same-origin"}, 200),
        ("GET", f"{SEARCH}&q={'x' * 9000}", {}, 414),
    ],
)
def test_only_reading_from_this_machine_and_page_is_answered(
    port: int, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    headers = {name: value.replace("{port}", str(port)) for name, value in headers.items()}
    assert ask(port, path, method, **headers)[0] == status


def test_every_answer_forbids_scripts_frames_and_other_hosts(port: int) -> None:
    for path in ("/", "/nowhere", "/runs/none", "/static/style.css", "/runs/one/rewards?where=oops"):
        _, headers, body = ask(port, path)
        policy = dict(
            part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert not [
            value for name, value in policy.items() if "script" in name or value not in ("'none'", "'self'")
        ]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
        assert "<script" not in body


def test_every_page_asks_for_the_token(port: int) -> None:
    for path in ("/", "/runs/one", "/static/style.css", "/?token=wrong", "/?token=", "/?token=%C3%A9"):
        status, _, body = ask(port, path, Cookie="")
        assert (status, "one" in body.split()) == (401, False), path
    status, headers, _ = ask(port, f"/runs/one?token={TOKEN}&x=1", Cookie="")
    assert (status, headers["location"]) == (303, "/runs/one?x=1"), "the token leaves the address"
    assert {"HttpOnly", "SameSite=lax"} <= {part.strip() for part in headers["set-cookie"].split(";")}
    assert ask(port, "/runs/one", Cookie=headers["set-cookie"].partition(";")[0])[0] == 200
    assert ask(port, "/runs/one", Cookie="qrpo_browse=wrong")[0] == 401
    away = ask(port, f"//other.example/?token={TOKEN}")[1]["location"]
    assert away.startswith("/other"), "no redirect to another host"


@pytest.mark.parametrize("token", ["", "short"])
def test_a_token_that_can_be_guessed_is_refused(memory: Store, token: str) -> None:
    with pytest.raises(ConfigError, match="expected at least 16"):
        start_browsing(memory, host="0.0.0.0", port=0, token=token, say=print)


@pytest.mark.parametrize("noted", [b"[]", b"{", b'{"stages": 3}', b'{"stages": {"rewards": 1}}'])
def test_a_damaged_run_hides_no_other(serve: Callable[..., int], tmp_path: Path, noted: bytes) -> None:
    store = Store(tmp_path)
    write_artifacts(store, "one")
    (tmp_path / "runs" / "two.json").write_bytes(noted)

    status, _, body = ask(serve(store), "/")

    assert status == 200
    assert "/runs/one" in body
    assert "damaged" in body


@pytest.mark.parametrize(
    "path",
    [
        "/runs/..%2F..%2Fetc/passwd",
        "/artifacts/rewards/..%2F..%2F..%2Fetc%2Fpasswd",
        "/artifacts/..%2Fparts/x",
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/prompt/one/zz",
        "/prompt/none/5f",
        "/runs/one/rewards/row/72",
        "/runs/one/nothing",
        "/compare?a=none&b=one",
        "/compare/zz?a=one&b=one",
        "/runs/%00",
    ],
)
def test_what_is_not_there_is_told_and_nothing_else_is_reached(port: int, path: str) -> None:
    status, _, body = ask(port, path)

    assert status == 404
    assert "root:" not in body
    assert "Traceback" not in body


def test_strange_numbers_and_names_in_an_address_do_no_harm(port: int) -> None:
    for query in (
        "page=-1",
        "page=99999999999999999999",
        "page=x",
        "sample=-3",
        "sample=9e9",
        "columns=nothing",
        "sort=nothing",
        "where=%00",
        "q=%22%3E%3Cscript%3E",
        "where=%27",
        "q=" + "x" * 5000,
    ):
        status, _, body = ask(port, f"/runs/one/rewards?{query}")
        assert status == 200, query
        assert "<script>" not in body


def test_damaged_part_is_told_with_its_remedy(serve: Callable[..., int], tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_artifacts(store, "one")
    part = storage.open(store, "one", "rewards").manifest.parts[0]
    (tmp_path / part.table.key).write_bytes(b"cut short")

    status, _, body = ask(serve(store), "/runs/one/rewards")

    assert status == 500
    assert "qrpo verify --repair" in body


def test_huge_completion_leaves_the_page_small(serve: Callable[..., int], tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, "completions", [table("completions", [row("completions", text="<b>" * 2_000_000)])])
    port = serve(store)

    assert len(ask(port, "/runs/one/completions")[2]) < 20_000
    shown = ask(port, "/runs/one/completions/row/0")[2]
    assert "6,000,000 characters in all" in shown
    assert len(shown) < 1_000_000


@pytest.mark.slow
def test_command_says_where_it_serves_and_makes_up_a_token(tmp_path: Path) -> None:
    command = [QRPO, "browse", "--store", tmp_path / "store", "--port", "0", "--host", "0.0.0.0"]
    log = tmp_path / "log"
    said = re.compile(r"http://0\.0\.0\.0:(\d+)/\?token=(\S+)")
    with running(command, log, env=clean_environment()) as process:
        found = eventually(lambda: said.search(log.read_text()), "its address", log=log, process=process)
        assert found is not None
        port, token = int(found[1]), found[2]
        assert ask(port, "/", Cookie="")[0] == 401
        status, _, page = ask(port, "/", Cookie=f"qrpo_browse={token}")
        assert (status, "There are no runs here yet" in page) == (200, True)


def test_taken_port_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = invoke("browse", "--store", tmp_path, "--port", taken.getsockname()[1])

    assert result.exit_code == 2
    assert "--port 0 takes a free one" in result.stderr
    assert "Traceback" not in result.stderr
