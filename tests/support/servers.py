"""A real HTTP server that tests control, in the form of OpenAI's chat completions."""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Reply = tuple[int, dict[str, str], Any]
"""Status, headers, and the payload (bytes, or an object for JSON)."""


@dataclass
class Request:
    """A request that the server received; `time` is on time.monotonic."""

    time: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])


class FakeChatServer:
    """Serves `url`; `answer(number, body)` returns the reply to request number 1, 2, ... Use it as a context manager."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Reply] | None = None) -> None:
        self.answer = answer or (lambda number, body: token_completion("3"))
        self.requests: list[Request] = []
        self.most_busy = 0
        busy, lock, owner = [0], threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    owner.requests.append(Request(time.monotonic(), self.path, dict(self.headers), body))
                    number = len(owner.requests)
                    busy[0] += 1
                    owner.most_busy = max(owner.most_busy, busy[0])
                try:
                    status, headers, payload = owner.answer(number, body)
                finally:
                    with lock:
                        busy[0] -= 1
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                sent = {"content-type": "application/json", **headers, "content-length": str(len(data))}
                try:
                    self.send_response(status)
                    for name, value in sent.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # the client did not wait

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def token_completion(text: str, top: Mapping[str, float] | None = None, tokens: int = 10) -> Reply:
    """A chat completion whose first token has these probabilities, by default `text` for certain."""
    top_logprobs = [
        {"token": token, "bytes": None, "logprob": math.log(p)} for token, p in (top or {text: 1.0}).items()
    ]
    logprobs = {
        "content": [{"token": text, "bytes": None, "logprob": 0.0, "top_logprobs": top_logprobs}],
        "refusal": None,
    }
    status, headers, payload = text_completion(text, tokens, finish="length")
    payload["choices"][0]["logprobs"] = logprobs
    return status, headers, payload


def text_completion(text: str, tokens: int = 0, finish: str = "stop") -> Reply:
    """A chat completion without log-probabilities."""
    message = {"role": "assistant", "content": text}
    payload = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": message, "logprobs": None}],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }
    return 200, {}, payload


def failure(status: int, headers: dict[str, str] | None = None) -> Reply:
    return status, headers or {}, {"error": {"message": f"this is a {status}"}}


def closed_url() -> str:
    """A URL at which nobody listens."""
    with FakeChatServer() as server:
        return server.url
