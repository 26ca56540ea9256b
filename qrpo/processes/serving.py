"""The child's side of `qrpo.processes.child`: make the object, answer calls, and end with the parent."""

import gc
import os
import pickle
import select
import signal
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import qrpo.errors
from qrpo.errors import QRPOError
from qrpo.rewards.callables import load_callable

__all__ = ["GeneratorFunction", "serve"]

_AHEAD_BYTES = 64 << 20  # how far a child may run ahead of its reader


def serve(connection_fd: int, lifeline: int, parent: int) -> None:
    """The child's main loop: make the object, then answer calls until the parent says to end."""
    threading.Thread(target=_watch, args=(lifeline, parent), name="watch-parent", daemon=True).start()
    connection = Connection(connection_fd)
    outbox = _Outbox(connection)
    try:
        target, args = pickle.loads(connection.recv_bytes())  # noqa: S301
        gc.disable()  # looking for garbage again and again while thousands of modules load costs a fifth of the start
        served = load_callable(target)(*args)
        gc.freeze()
        gc.enable()
        outbox.put("ready", None)
        while (request := pickle.loads(connection.recv_bytes())) is not None:  # noqa: S301
            method, args = request
            try:
                result = getattr(served, method)(*args)
                if isinstance(result, types.GeneratorType):
                    for item in result:
                        outbox.put("item", item)
                    outbox.put("done", None)
                else:
                    outbox.put("item", result)
            except Exception as error:
                outbox.put("error", _failure(error))
        if callable(close := getattr(served, "close", None)):
            close()
        status = 0
    except BaseException as error:
        outbox.put("error", _failure(error))
        status = 1
    outbox.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # engines' own clean-up at exit can hang; the parent kills what is left of the group


def _watch(lifeline: int, parent: int) -> None:
    """Wait for the parent's end, then kill the group that this process leads."""
    while True:
        readable, _, _ = select.select([lifeline], [], [], 1.0)
        # never written to: readable means closed. A fork of the parent may hold it open, hence the second look.
        if readable or os.getppid() != parent:
            os.killpg(os.getpgrp(), signal.SIGKILL)


def _failure(error: BaseException) -> dict[str, Any]:
    traceback.print_exception(error)  # into the log
    known = isinstance(error, QRPOError) and type(error).__name__ in qrpo.errors.__all__
    return {
        "class": type(error).__name__ if known else None,
        "message": str(error) if known else "".join(traceback.format_exception_only(error)).strip(),
        "traceback": "".join(traceback.format_exception(error)),
    }


class _Outbox:
    """Sends from a thread of its own, at most `_AHEAD_BYTES` behind what was put in."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="send-results", daemon=True).start()

    def put(self, kind: str, payload: object) -> None:
        data = pickle.dumps((kind, payload), protocol=5)
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < _AHEAD_BYTES)
            self._waiting.append(data)
            self._bytes += len(data)
            self._changed.notify_all()

    def flush(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                data = self._waiting.popleft()
            try:
                self._connection.send_bytes(data)
            except OSError:
                return  # the parent is gone, and the watcher is about to act on it
            with self._changed:
                self._bytes -= len(data)
                self._changed.notify_all()


class GeneratorFunction:
    """One generator function ("module:function" or "file.py:function") as an object with one method."""

    def __init__(self, target: str):
        self._function = load_callable(target)

    def run(self, *args: Any) -> Iterator[Any]:
        """What the function yields."""
        yield from self._function(*args)
