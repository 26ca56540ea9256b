"""The child's side of `qrpo.processes.child`: create the object and answer calls."""

import gc
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any

from qrpo.callables import load_callable
from qrpo.errors import QRPOError

_AHEAD_BYTES = 64 << 20  # how far a child may compute ahead of its reader


def serve(connection_fd: int, parent: int) -> None:
    """Create the object, then answer calls until the parent says to end."""
    threading.Thread(target=_end_with_parent, args=(parent,), name="watch-parent", daemon=True).start()
    connection = Connection(connection_fd)
    outbox = _Outbox(connection)
    try:
        target, args = pickle.loads(connection.recv_bytes())  # noqa: S301
        gc.disable()  # garbage collection while thousands of modules load takes a fifth of the start
        served = load_callable(target)(*args)
        gc.freeze()
        gc.enable()
        outbox.put("ready")
        while (request := pickle.loads(connection.recv_bytes())) is not None:  # noqa: S301
            method, args = request
            try:
                result = getattr(served, method)(*args)
                if isinstance(result, types.GeneratorType):
                    for item in result:
                        outbox.put("item", item)
                    outbox.put("done")
                else:
                    outbox.put("item", result)
            except Exception as error:
                outbox.put_error(error)
        if callable(close := getattr(served, "close", None)):
            close()
        status = 0
    except BaseException as error:
        outbox.put_error(error)
        status = 1
    outbox.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # engines can hang in their exit handlers; the parent kills the rest of the group


def _end_with_parent(parent: int) -> None:
    """Wait until the parent has ended, then kill the process group that this process leads."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


class _Outbox:
    """Sends messages from a thread, at most `_AHEAD_BYTES` behind `put`."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="send-results")
        self._unsent: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0

    def put(self, kind: str, *payload: object) -> None:
        data = pickle.dumps((kind, *payload), protocol=5)
        self._unsent.append((self._sender.submit(self._connection.send_bytes, data), len(data)))
        self._bytes += len(data)
        while self._unsent and (self._bytes >= _AHEAD_BYTES or self._unsent[0][0].done()):
            sent, size = self._unsent.popleft()
            wait([sent])  # it fails only where the parent has ended, and `_end_with_parent` handles that
            self._bytes -= size

    def put_error(self, error: BaseException) -> None:
        traceback.print_exception(error)  # into the log
        trace = "".join(traceback.format_exception(error))
        # only exceptions that the parent can unpickle travel as they are
        portable = isinstance(error, QRPOError) and type(error).__module__ == QRPOError.__module__
        self.put("error", error if portable else _last_lines(error), trace)

    def flush(self) -> None:
        self._sender.shutdown()


def _last_lines(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


class GeneratorFunction:
    """A generator function, named as for `load_callable`, as an object with the method `run`."""

    def __init__(self, target: str):
        self._function = load_callable(target)

    def run(self, *args: Any) -> Iterator[Any]:
        """What the function yields."""
        yield from self._function(*args)
