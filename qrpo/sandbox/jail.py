"""One jail, controlled from the host: a zygote process that runs one job after another, each in a
new process.

The host only transfers bytes. It writes a job into a pipe and reads the answer up to a limit. The
zygote, which foreign code cannot reach, reports how the job's process exited.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qrpo.errors import EngineError
from qrpo.sandbox.inside.framing import complete_frames, frame
from qrpo.sandbox.inside.zygote import BUSY_SHARE, EXIT_RECORD
from qrpo.sandbox.isolator import PACKAGES, bare_command, find_packages, jail_command
from qrpo.sandbox.limits import Limits

__all__ = ["Exit", "Jail", "Job"]

_START_SECONDS = 120.0
_PATIENCE_SECONDS = 0.005
_GRACE_SECONDS = 60.0  # after all limits, until the zygote counts as hung


@dataclass(frozen=True, slots=True)
class Exit:
    """How a job's process exited."""

    status: int
    """Exit code, or minus the signal."""
    reason: str
    """Why it was killed: "wall time" or "output"; else empty."""
    cpu_seconds: float


class Jail:
    """A running zygote, for one job and one thread at a time. Also a context manager."""

    def __init__(self, limits: Limits, *, packages: Sequence[str] = (), bare: bool = False):
        self.limits = limits
        self._packages = find_packages(packages)
        self._bare = bare
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Jail":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def start(self, *messages: bytes | str) -> "Job":
        """Start a job in a new process; EngineError if the jail cannot be created."""
        control = self._running()
        job_read, job_write = os.pipe()
        answer_read, answer_write = os.pipe()
        try:
            socket.send_fds(control, [b"R"], [job_read, answer_write])
        except OSError as error:
            os.close(job_write)
            os.close(answer_read)
            self.close()
            raise EngineError(
                f"the sandbox's zygote exited between two jobs: {error}", transient=True
            ) from error
        finally:
            os.close(job_read)
            os.close(answer_write)
        os.set_blocking(job_write, False)
        os.set_blocking(answer_read, False)
        job = Job(self, control, job_write, answer_read)
        job.send(*messages)
        return job

    def close(self) -> None:
        """End the zygote and all its processes."""
        process, self._process = self._process, None
        if self._control is not None:
            self._control.close()
            self._control = None
        if process is not None:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _running(self) -> socket.socket:
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self.close()
        control, zygote_end = socket.socketpair()
        self._folder = tempfile.TemporaryDirectory(prefix="qrpo-sandbox-")
        path = [str(package.parent) for package in self._packages.values()] if self._bare else [PACKAGES]
        importable = {"packages": list(self._packages), "path": path}
        settings = json.dumps({**self.limits.plain(), **importable, "bare": self._bare})
        command = (
            bare_command(zygote_end.fileno(), settings)
            if self._bare
            else jail_command(zygote_end.fileno(), settings, self._packages)
        )
        with zygote_end, tempfile.TemporaryFile() as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(zygote_end.fileno(),),
                cwd=self._folder.name,
                env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
            )
            self._control = control
            zygote_end.close()
            control.settimeout(_START_SECONDS)
            with contextlib.suppress(TimeoutError, ConnectionError):
                if control.recv(1) == b"S":
                    control.settimeout(None)
                    return control
            self.close()
            output.seek(0)
            printed = output.read().decode(errors="replace").strip() or "it printed nothing"
            raise EngineError(
                f"bubblewrap could not create a jail: {printed}. It needs user namespaces: where a container or the system "
                "forbids them (kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces, docker without "
                "`--security-opt seccomp=unconfined`), allow them"
            )


class Job:
    """A job in its process: the output so far, and how it exited."""

    def __init__(self, jail: Jail, control: socket.socket, job: int, answer: int):
        self._jail = jail
        self._control = control
        self._job: int | None = job
        self._answer = answer
        self._pending = bytearray()
        self._limit = int(jail.limits.output_mb * (1 << 20))
        self._reading = True
        longest = 2 * jail.limits.wall_seconds + jail.limits.cpu_seconds / BUSY_SHARE
        self._deadline = time.monotonic() + longest + _GRACE_SECONDS
        self.output = bytearray()
        self.exit: Exit | None = None

    def send(self, *messages: bytes | str) -> None:
        """Queue messages for the process."""
        for message in messages:
            data = message.encode("utf-8", "surrogatepass") if isinstance(message, str) else message
            self._pending += frame(data)

    def finish(self) -> Exit:
        """Wait for the exit of the process, and keep its whole answer in `output`."""
        try:
            while self.exit is None:
                self._exchange(closing=True)
            return self.exit
        finally:
            self._close()

    def next_frame(self, count: int) -> bytes | None:
        """Message number `count` of the answer; None if the process exited before it."""
        while True:
            frames = complete_frames(self.output, count + 1)
            if len(frames) > count:
                return frames[count]
            if self.exit is not None:
                return None
            self._exchange(closing=False)

    def kill(self) -> None:
        """Kill the process now."""
        if self.exit is None:
            with contextlib.suppress(OSError):
                self._control.sendall(b"K")
            self.finish()
        self._close()

    def _exchange(self, *, closing: bool) -> None:
        """Wait for one or several events, and handle them."""
        if closing and not self._pending:
            self._close_job()
            # most processes exit soon and their answer fits the pipe: then one read is enough
            if select.select([self._control], [], [], _PATIENCE_SECONDS)[0]:
                self._read_exit()
                return
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        if self._reading:
            poller.register(self._answer, select.POLLIN)
        if self._pending and self._job is not None:
            poller.register(self._job, select.POLLOUT)
        ready = {fd for fd, _ in poller.poll(max(0.0, self._deadline - time.monotonic()) * 1000)}
        if self._answer in ready:
            self._read()
        if self._job in ready and self._job is not None:
            try:
                del self._pending[: os.write(self._job, self._pending)]
            except BrokenPipeError:
                self._pending.clear()
        if self._control.fileno() in ready:
            self._read_exit()
        elif not ready:
            self._fail("did not answer in time")

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._answer, 1 << 16)
            self._reading = bool(data)
            self.output += data
        if len(self.output) > self._limit and self._reading:
            self._reading = False
            self._control.sendall(b"K")

    def _read_exit(self) -> None:
        message = b""
        while len(message) < 1 + EXIT_RECORD.size:
            data = self._control.recv(1 + EXIT_RECORD.size - len(message))
            if not data:
                self._fail("died")
            message += data
        status, reason, cpu = EXIT_RECORD.unpack(message[1:])
        while self._reading:  # all writers have exited: read the rest
            before = len(self.output)
            self._read()
            if len(self.output) == before:
                break
        why = "output" if len(self.output) > self._limit else "wall time" if reason == b"w" else ""
        self.exit = Exit(os.waitstatus_to_exitcode(status), why, cpu)
        del self.output[self._limit :]

    def _fail(self, how: str) -> None:
        self._jail.close()
        raise EngineError(f"the sandbox's zygote {how}; the next call starts another", transient=True)

    def _close_job(self) -> None:
        if self._job is not None:
            os.close(self._job)
            self._job = None

    def _close(self) -> None:
        self._close_job()
        if self._answer >= 0:
            os.close(self._answer)
            self._answer = -1
