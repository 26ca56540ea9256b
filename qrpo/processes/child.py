"""Run an object in a child process that frees all its memory and never outlives its parent.

Generation engines and reward models leave memory allocated, start processes and sometimes crash.
`Child` keeps such an object in a child process and forwards calls of its methods. It guarantees:

- The child leads a process group. Closing it, or abandoning an iterator, kills the whole group.
- The child kills its group when the parent ends, even by SIGKILL: a thread in the child compares
  `os.getppid()` with the parent's id. (PR_SET_PDEATHSIG acts on the end of the *thread* that
  started the child.)
- The child computes ahead of the reader by a bounded number of bytes, so an engine stays busy while
  results are stored.
- Output goes to a log file. A QRPOError is raised in the parent as it is; any other error becomes
  an EngineError that names the log.

The child is a new interpreter, not a fork: it shares no threads and no CUDA state with the parent.
It does not import the parent's main script, so scripts need no `if __name__ == "__main__"`. Its
code is `qrpo.processes.serving`.
"""

import contextlib
import json
import os
import pickle
import re
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

from qrpo.errors import EngineError, QRPOError

_BOOT = (
    "import json, sys; boot = json.loads(sys.argv[1]); sys.path[:] = boot['path'];"
    "from qrpo.processes.serving import serve; serve(boot['connection'], boot['parent'])"
)
# The last line of a traceback, in a log perhaps behind a process and a time.
_ERROR = re.compile(r"^(?:\(.*?\) )?(?:ERROR .*?\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)


class Child:
    """An object in a child process. The first call starts the process and creates the object as
    `target(*args)`.

    Calls from several threads are served one after another. If the child died or was killed, the
    next call starts a new one. Output is appended to `log`; without `log` it is kept only for error
    messages. With `patience`, a child whose call is abandoned receives SIGTERM and has this many
    seconds to save its state.
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
        self._target = (target, args)
        self._log = log
        self._env = dict(env or {})
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose call is being served
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        """The id of the running child process and of its process group; None if it does not run."""
        return self._process.popen.pid if self._process and self._process.alive() else None

    def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """The result of a method; TimeoutError after `timeout` seconds, and the child is killed."""
        with contextlib.closing(self._exchange(method, args, timeout, streaming=False)) as answers:
            return next(answers)

    def stream(self, method: str, *args: Any, timeout: float | None = None) -> Iterator[Any]:
        """Yield a generator method's items as they arrive; TimeoutError, and the child is killed,
        if none does in `timeout` seconds. Closing the iterator kills the child."""
        return self._exchange(method, args, timeout, streaming=True)

    def close(self, grace: float = 5.0) -> None:
        """Give the child `grace` seconds to clean up, then kill its group. A call restarts it."""
        process, self._process = self._process, None
        if process is not None:
            process.stop(grace)

    def _exchange(
        self, method: str, args: tuple[Any, ...], timeout: float | None, *, streaming: bool
    ) -> Generator[Any, None, None]:
        if self._owner == threading.get_ident():
            raise EngineError(f"{self.name} is still answering this thread: read or close the first iterator")
        with self._lock:
            self._owner = threading.get_ident()
            reusable = yielded = False
            try:
                process = self._start()
                process.send((method, args))
                while True:
                    kind, *payload = process.receive(timeout)
                    if kind == "done":
                        reusable = True
                        return
                    if kind == "error":
                        # usable after a QRPOError, but not after an EngineError or in a stream
                        reusable = type(payload[0]) not in (str, EngineError) and not yielded
                        raise self._error(process, *payload)
                    reusable = not streaming  # a call has one item, and its reader stops after it
                    yielded = True
                    yield payload[0]
            except _Ended as ended:
                raise EngineError(f"{self.name} {ended}", transient=ended.transient) from None
            finally:
                self._owner = None
                if not reusable and self._process is not None:
                    broken, self._process = self._process, None
                    if self._patience and broken.alive():
                        broken.popen.terminate()
                    broken.stop(grace=self._patience)

    def _start(self) -> "_Process":
        if self._process is not None and not self._process.alive():
            self.close(grace=0.0)
        if self._process is None:
            self._process = process = _Process(
                self._log, self._env
            )  # `_exchange` stops it if the start fails
            process.send(self._target)
            kind, *payload = process.receive(None)
            if kind == "error":
                raise self._error(process, *payload)
        return self._process

    def _error(self, process: "_Process", error: QRPOError | str, trace: str) -> QRPOError:
        if isinstance(error, str):
            error = EngineError(f"{self.name} failed: {error}{process.cause(error)}. {process.where()}")
        error.add_note(f"In the child process:\n{trace}")
        return error


class _Ended(Exception):
    """The child process ended or closed its connection; the message says how.

    A process that exits with a code of its own does so again: that is not `transient`.
    """

    def __init__(self, message: str, transient: bool):
        super().__init__(message)
        self.transient = transient


class _Process:
    """One child process and the connection to it."""

    def __init__(self, log: Path | None, env: Mapping[str, str]):
        self.log = log
        self._output: IO[bytes]
        if log is None:
            self._output = tempfile.TemporaryFile()  # noqa: SIM115
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._output = log.open("ab+")
        self._begin = self._output.seek(0, os.SEEK_END)
        self.connection, child_end = Pipe()
        boot = {"connection": child_end.fileno(), "parent": os.getpid(), "path": list(map(str, sys.path))}
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(boot)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(child_end.fileno(),),
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            )
        except BaseException:
            self.connection.close()
            self._output.close()
            raise
        finally:
            child_end.close()
        # also runs when this object is garbage collected and when the interpreter exits
        self._kill = weakref.finalize(self, _kill_group, self.popen, self.connection, self._output)

    def alive(self) -> bool:
        return self._status() is None

    def _status(self) -> int | None:
        """The exit code, or minus the signal; None while it runs. Does not reap the process."""
        if self.popen.returncode is not None:
            return self.popen.returncode
        ended = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def send(self, message: object) -> None:
        data = pickle.dumps(message, protocol=5)  # outside `try`: errors of pickling are the caller's
        try:
            self.connection.send_bytes(data)
        except OSError:
            raise self._ended() from None

    def receive(self, timeout: float | None) -> tuple[Any, ...]:
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            wait = min(1.0, max(0.0, deadline - time.monotonic()))
            try:
                # a grandchild may keep the connection open after the child died: check `alive` too
                if self.connection.poll(wait) or (not self.alive() and self.connection.poll(0)):
                    return pickle.loads(self.connection.recv_bytes())  # type: ignore[no-any-return]  # noqa: S301
            except (EOFError, OSError):
                raise self._ended() from None
            if not self.alive():
                raise self._ended()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no answer within {timeout:g} s")

    def cause(self, error: str) -> str:
        """The first error in the output, if it is another one: that of a process which the child
        started."""
        self._output.seek(self._begin)
        found = _ERROR.search(self._output.read(16 << 20).decode(errors="replace"))
        return "" if found is None or found[1] in error else f". Cause: {found[1]}"

    def where(self) -> str:
        """The log's path, or the last lines of output if there is no log."""
        if self.log:
            return f"its log: {self.log}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - 16384))
        lines = self._output.read().decode(errors="replace").splitlines()[-20:]
        return "its last output:\n" + "\n".join(lines)

    def stop(self, grace: float) -> None:
        if grace and self.alive():
            with contextlib.suppress(OSError):
                self.connection.send_bytes(pickle.dumps(None))
            self._wait(grace)
        self._kill()

    def _wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while (status := self._status()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return status

    def _ended(self) -> _Ended:
        status = self._wait(5.0)
        if status is None:  # it closed its connection but still runs
            how = "stopped answering"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                how += " (the system does this where memory runs out)"
        else:
            how = f"exited with code {status}"
        message = f"{how} during a call. The next call starts it again. {self.where()}"
        return _Ended(message, transient=status is None or status < 0)


def _kill_group(popen: subprocess.Popen[bytes], connection: Connection, output: IO[bytes]) -> None:
    """Kill the child's process group and close the files that belong to it."""
    # The group is signalled even if its leader has ended, since others of the group may still run.
    # The leader is reaped only afterwards: until then no other group can get its number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
    connection.close()
    output.close()
