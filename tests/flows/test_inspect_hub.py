"""`qrpo inspect --hub`, up to the bytes that leave: the hub is a server of this test that speaks its HTTP interface."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from storage import Store
from tests.support.views import write_artifacts


class Hub(ThreadingHTTPServer):
    """Takes a dataset as the hub does: create the repository, ask how to send each file, one commit with all of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Request(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "siblings": [], "id": "org/rows", "tags": [], "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.tokens.add(self.headers.get("authorization"))
        if self.server.refuse:
            self._answer({"error": "this name is not yours"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/datasets/org/rows"})
        elif self.path.startswith("/api/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/datasets/org/rows/commit/1"
            self._answer({"commitUrl": url, "commitOid": "1", "success": True})
        else:
            self._answer({"error": self.path}, 404)

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def push(hub: Hub, tmp_path: Path, qrpo_process: Callable[..., Any]) -> Callable[..., Any]:
    """`qrpo inspect one rewards --hub`, with the hub of this test."""
    write_artifacts(Store(tmp_path / "store"), "one")
    where = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = ("inspect", "one", "rewards", "--store", tmp_path / "store", "--hub")
    return lambda *arguments, **more: qrpo_process(*command, *arguments, **(where | more))


@pytest.mark.slow
def test_rows_are_pushed_as_a_private_dataset_with_a_card(hub: Hub, push: Callable[..., Any]) -> None:
    result = push("org/rows", "--where", "reward > 9", "--sort=-reward", HF_TOKEN="hf_test")

    assert result.returncode == 0, result.stderr
    assert f"pushed to {hub.url}/datasets/org/rows" in result.stdout
    (created,) = hub.created
    assert (created["name"], created["organization"], created["type"]) == ("rows", "org", "dataset")
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_test"}
    assert hub.files.keys() == {"README.md", "data/train-00000-of-00001.parquet"}
    rows = pl.read_parquet(io.BytesIO(hub.files["data/train-00000-of-00001.parquet"]))
    assert rows["reward"].to_list() == sorted(rows["reward"].to_list(), reverse=True)
    assert rows.height == 17
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nconfigs:\n")
    assert "17 rows of the artifact `rewards/" in card
    assert "where: `reward > 9`" in card


@pytest.mark.slow
def test_what_the_hub_refuses_is_told_in_one_line_with_the_remedy(hub: Hub, push: Callable[..., Any]) -> None:
    hub.refuse = True

    refused = push("org/rows", HF_TOKEN="hf_secret")
    offline = push("org/rows", HF_TOKEN="hf_secret", HF_HUB_OFFLINE="1")
    misnamed = push("not a name", HF_TOKEN="hf_secret")

    assert (refused.returncode, offline.returncode, misnamed.returncode) == (1, 2, 1)
    assert "HF_TOKEN says who you are" in refused.stderr
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    for result in (refused, offline, misnamed):
        assert "Traceback" not in result.stderr
        assert "hf_secret" not in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    assert hub.files == {}
