"""Work in a child process that gives its memory back and never outlives its parent.

Generation engines and reward models leave memory behind in the process that ran them, start processes of their own,
and sometimes die. So each runs in a child: a `Child` keeps an object there (`qrpo.processes.serving.GeneratorFunction` where it is
one function) and serves calls to its methods. It promises:

- the child leads a process group; closing it, or leaving its iterator half read, kills the whole group;
- it dies with its parent, even by kill -9: a thread in the child waits for the end of a pipe that only the parent
  holds open. (PR_SET_PDEATHSIG would do it for the *thread* that started the child, which may end long before.)
- it runs ahead of the reader by a bounded amount, so an engine stays busy while its results are written down;
- what it prints goes to a log file; its errors rise in the parent: a QRPOError as itself, anything else as an
  EngineError that says how it ended and where its log lies.

The child is a fresh interpreter (`sys.executable`), not a fork: nothing of the parent's threads or CUDA state is in
it. It does not import the parent's main script, so no `if __name__ == "__main__"` is asked of the user's. What runs
in it is `qrpo.processes.serving`.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import qrpo.errors
from qrpo.errors import EngineError, QRPOError

__all__ = ["Child"]

_BOOT = (
    "import json, sys; boot = json.loads(sys.argv[1]); sys.path[:] = boot['path'];"
    "from qrpo.processes.serving import serve; serve(boot['connection'], boot['lifeline'], boot['parent'])"
)


class Child:
    """An object that lives in a child process: `target(*args)` makes it there, at the first call.

    Calls from several threads are served one after another. After the child died, or was killed because a call was
    abandoned, the next call starts a new one. `log` is appended to; without it the output is kept only for errors.
    With `patience`, a child whose call is abandoned is sent a SIGTERM and has so many seconds to save what it has.
    """

    def __init__(
        self,
        target: str,
        *args: Any,
        name: str | None = None,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        patience: float = 0.0,
    ):
        self.name = name or target
        self._patience = patience
        self._boot = (target, args)
        self._log = log
        self._env = dict(env or {})
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._running: _Running | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, which is also its group's, while it runs."""
        return self._running.process.pid if self._running and self._running.alive() else None

    def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """The result of one method call. After `timeout` seconds the child is killed and TimeoutError raised."""
        with contextlib.closing(self._exchange(method, args, timeout, streaming=False)) as answers:
            return next(answers)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """The items of a generator method, as they come. Closing the iterator early kills the child."""
        return self._exchange(method, args, None, streaming=True)

    def close(self, grace: float = 5.0) -> None:
        """End the child: it may tidy up for `grace` seconds, then its group is killed. Calls may start it again."""
        running, self._running = self._running, None
        if running is not None:
            running.stop(grace)

    def _exchange(
        self, method: str, args: tuple[Any, ...], timeout: float | None, *, streaming: bool
    ) -> Generator[Any, None, None]:
        if self._owner == threading.get_ident():
            raise EngineError(f"{self.name} is still answering this thread: read or close the first iterator")
        with self._lock:
            self._owner = threading.get_ident()
            finished = yielded = False
            try:
                running = self._start()
                running.send((method, args))
                while True:
                    kind, payload = running.receive(timeout)
                    if kind == "item":
                        finished = not streaming  # a call has one item, and its reader leaves with it
                        yielded = True
                        yield payload
                    elif kind == "done":
                        finished = True
                        return
                    else:
                        # after an error of its own kind the child is well; after any other it is started afresh
                        finished = payload["class"] not in (None, "EngineError") and not yielded
                        raise _raised(payload, self.name, running.where())
            except _Ended as ended:
                raise EngineError(f"{self.name} {ended}") from None
            finally:
                self._owner = None
                if not finished and self._running is not None:
                    broken, self._running = self._running, None
                    if self._patience and broken.alive():
                        broken.process.terminate()
                    broken.stop(grace=self._patience)

    def _start(self) -> "_Running":
        if self._running is not None and not self._running.alive():
            self._running.stop(grace=0.0)
            self._running = None
        if self._running is None:
            running = _Running(self._log, self._env)
            self._running = running  # from here on the caller stops it if it fails
            running.send(self._boot)
            kind, payload = running.receive(None)
            if kind == "error":
                raise _raised(payload, self.name, running.where())
        return self._running


class _Ended(Exception):
    """The child is gone; the text says how."""


class _Running:
    """One living child process and the two pipes to it."""

    def __init__(self, log: Path | None, env: Mapping[str, str]):
        self.log = log
        self._output: IO[bytes]
        if log is None:
            self._output = tempfile.TemporaryFile()  # noqa: SIM115
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._output = log.open("ab+")
        self.connection, theirs = Pipe()
        lifeline, held = os.pipe()
        boot = {
            "connection": theirs.fileno(),
            "lifeline": lifeline,
            "parent": os.getpid(),
            "path": [str(entry) for entry in sys.path],
        }
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(boot)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            )
        except BaseException:
            self.connection.close()
            os.close(held)
            self._output.close()
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        # also runs when this object is collected and when the interpreter exits
        self._end = weakref.finalize(self, _end, self.process, self.connection, held, self._output)

    def alive(self) -> bool:
        return self._status() is None

    def _status(self) -> int | None:
        """The exit code, or minus the signal; None while it runs. Leaves the process unreaped, see `_end`."""
        if self.process.returncode is not None:
            return self.process.returncode
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def send(self, message: object) -> None:
        data = pickle.dumps(message, protocol=5)  # first, so that what cannot be pickled raises here
        try:
            self.connection.send_bytes(data)
        except OSError:
            raise _Ended(self._epitaph()) from None

    def receive(self, timeout: float | None) -> tuple[str, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            wait = 1.0 if deadline is None else min(1.0, max(0.0, deadline - time.monotonic()))
            try:
                # the process is asked too: something that it forked may still hold its end of the pipe open
                if self.connection.poll(wait) or (not self.alive() and self.connection.poll(0)):
                    return pickle.loads(self.connection.recv_bytes())  # type: ignore[no-any-return]  # noqa: S301
            except (EOFError, OSError):
                raise _Ended(self._epitaph()) from None
            if not self.alive():
                raise _Ended(self._epitaph())
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"no answer within {timeout:g} s")

    def where(self) -> str:
        return f"its log: {self.log}" if self.log else f"its last output:\n{self._tail()}"

    def stop(self, grace: float) -> None:
        if grace and self.alive():
            with contextlib.suppress(OSError):
                self.connection.send_bytes(pickle.dumps(None))
            self._wait(grace)
        self._end()

    def _wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while (status := self._status()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return status

    def _epitaph(self) -> str:
        status = self._wait(5.0)
        if status is None:  # it closed its end but lives on
            how = "stopped answering"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                how += " (the system does this where memory runs out)"
        else:
            how = f"exited with code {status}"
        return f"{how} in the middle of its work. The next call starts it again. {self.where()}"

    def _tail(self, lines: int = 20) -> str:
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - 16384))
        return "\n".join(self._output.read().decode(errors="replace").splitlines()[-lines:])


def _end(process: subprocess.Popen[bytes], connection: Connection, lifeline: int, output: IO[bytes]) -> None:
    """Kill the child's group and close every pipe to it."""
    # The group is signalled even where its leader has ended, since others of the group may live on. The leader is
    # reaped only afterwards: until then no other group can have been given its number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
    os.close(lifeline)
    output.close()


def _raised(failure: dict[str, Any], name: str, where: str) -> QRPOError:
    if failure["class"] is not None:
        error: QRPOError = getattr(qrpo.errors, failure["class"])(failure["message"])
    else:
        error = EngineError(f"{name} failed: {failure['message']}. {where}")
    error.add_note(f"In the child process:\n{failure['traceback']}")
    return error
