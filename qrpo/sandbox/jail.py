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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from qrpo.errors import EngineError
from qrpo.sandbox.inside.framing import HEADER, frame, frame_end
from qrpo.sandbox.inside.zygote import CLOCK, EXIT_RECORD
from qrpo.sandbox.isolator import PACKAGES, StartError, bare_command, find_packages, jail_command, map_users
from qrpo.sandbox.limits import Limits

_START_SECONDS = 120.0
_PATIENCE_SECONDS = 0.005
_CHECK_SECONDS = 0.1  # between two looks at a process's processor time
_GRACE_SECONDS = 60.0  # without an answer of the zygote, until it counts as hung
_BUSY_SHARE = 0.05  # a process with a smaller share of a core sleeps
_STARVED = 4.0  # wall seconds for a second of processor time on a busy machine


@dataclass(frozen=True, slots=True)
class Exit:
    """How a job's process exited."""

    note: str
    """Why it failed: "wall time", "processor time: ...", "output", "signal 11 ...", "exit code 1";
    else empty."""
    timed_out: bool
    """Whether it exceeded a limit on time."""


@dataclass(slots=True)
class Spent:
    """What a solution has used, in all its processes."""

    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    """Only while the host waited for it."""


class Jail:
    """A running zygote, for one job and one thread at a time."""

    def __init__(self, limits: Limits, *, packages: Sequence[str] = (), bare: bool = False):
        self.limits = limits
        self._packages = find_packages(packages)
        self._bare = bare
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self, role: str, *messages: bytes | str, spent: Spent | None = None) -> "Job":
        """Start a job in a new process; StartError if the jail cannot be created."""
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
        job = Job(self, control, job_write, answer_read, role, spent or Spent())
        job.send(role, *messages)
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

    def _running(self) -> socket.socket:
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self.close()
        as_root = os.geteuid() == 0 and not self._bare
        path = [str(package.parent) for package in self._packages.values()] if self._bare else [PACKAGES]
        settings = {"packages": list(self._packages), "path": path, "bare": self._bare, "other_user": as_root}
        settings |= self.limits.plain()
        self._control, zygote_end = socket.socketpair()
        told, tell = os.pipe() if as_root else (-1, -1)
        wait, release = os.pipe() if as_root else (-1, -1)
        arguments = (zygote_end.fileno(), json.dumps(settings))
        users = (tell, wait) if as_root else None
        command = bare_command(*arguments) if self._bare else jail_command(*arguments, self._packages, users)
        with tempfile.TemporaryFile() as output, contextlib.ExitStack() as pipes:
            with zygote_end:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(zygote_end.fileno(), *(users or ())),
                    cwd=tempfile.gettempdir(),
                    env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
                )
            if as_root:
                os.close(tell)
                os.close(wait)
                info = pipes.enter_context(open(told, "rb", 0))  # bubblewrap writes to it until it is ready
                map_users(info, pipes.enter_context(open(release, "wb", 0)))
            self._control.settimeout(_START_SECONDS)
            with contextlib.suppress(TimeoutError, ConnectionError):
                if self._control.recv(1) == b"S":
                    self._control.settimeout(None)
                    return self._control
            self.close()
            output.seek(0)
            printed = output.read().decode(errors="replace").strip() or "it printed nothing"
            raise StartError(
                f"bubblewrap could not create a jail: {printed}. It needs user namespaces: where a container or the system "
                "forbids them (kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces, docker without "
                "`--security-opt seccomp=unconfined`), allow them"
            )


class Job:
    """A job in its process: the output so far, its messages, and how it exited."""

    def __init__(self, jail: Jail, control: socket.socket, job: int, answer: int, role: str, spent: Spent):
        self._jail, self._control, self._role = jail, control, role
        self._job: int | None = job
        self._answer: int | None = answer
        self._pending = bytearray()
        self._reading = True
        self._ordered = ""  # why it was ordered to be killed
        self._cpu = self._cpu_before = 0.0
        # messages, CPU and wall time at the start of a test, and when it was; None: at the next
        # look
        self._mark: tuple[int, float, float, float] | None = (0, 0.0, 0.0, time.monotonic())
        self._parsed = self._messages = self._received = 0
        self._asked: float | None = None  # since when the zygote owes the processor time
        self._next_check = time.monotonic() + _CHECK_SECONDS
        self.spent = spent
        self.output = bytearray()
        self.frames: deque[bytes] = deque()
        """Messages that `next_frame` has not returned. A program's output has none."""
        self.exit: Exit | None = None
        self.is_live = False
        """Whether the time of a test ends at `begin` only, not at each message."""

    def send(self, *messages: bytes | str) -> None:
        """Queue messages for the process."""
        for message in messages:
            data = message.encode("utf-8", "surrogatepass") if isinstance(message, str) else message
            self._pending += frame(data)

    def begin(self, spent: Spent | None = None, *, new_test: bool = True) -> None:
        """Count output from here, and the time of a test: what follows is another request."""
        self._received = 0
        if new_test:
            self._mark = None
        if spent is not None:
            self.spent, self._cpu_before = spent, self._cpu
            self._next_check = time.monotonic() + _CHECK_SECONDS

    def finish(self) -> Exit:
        """Wait for the exit of the process, and keep its whole answer in `output` and `frames`."""
        try:
            while self.exit is None:
                self._exchange(closing=True)
            self._parse()
            return self.exit
        finally:
            self._close_job()
            if self._answer is not None:
                os.close(self._answer)
                self._answer = None

    def next_frame(self) -> bytes | None:
        """The next message of the answer; None if the process exited before it."""
        while True:
            self._parse()
            if self.frames:
                return self.frames.popleft()
            if self.exit is not None:
                return None
            self._exchange(closing=False)

    def kill(self) -> None:
        """Kill the process now."""
        if self.exit is None:
            with contextlib.suppress(OSError):
                self._control.sendall(b"K")
        self.finish()

    def _parse(self) -> None:
        """Move the complete messages from `output` to `frames`."""
        if self._role == "program":
            return
        while (end := frame_end(self.output, self._parsed)) is not None:
            self.frames.append(bytes(self.output[self._parsed + HEADER : end]))
            self._parsed = end
            self._messages += 1
        if self._parsed > 1 << 16:
            del self.output[: self._parsed]
            self._parsed = 0

    def _exchange(self, *, closing: bool) -> None:
        """Wait for one or several events, and handle them."""
        started = time.monotonic()
        if closing and not self._pending:
            self._close_job()
            # most processes exit soon and their answer fits the pipe: then one read is enough
            if select.select([self._control], [], [], _PATIENCE_SECONDS)[0]:
                self._read_control()
                return
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        if self._reading and self._answer is not None:
            poller.register(self._answer, select.POLLIN)
        if self._pending and self._job is not None:
            poller.register(self._job, select.POLLOUT)
        ready = {fd for fd, _ in poller.poll(1000 * _CHECK_SECONDS)}
        now = time.monotonic()
        self.spent.wall_seconds += now - started
        if self._answer in ready:
            self._read()
        if self._job in ready and self._job is not None:
            try:
                del self._pending[: os.write(self._job, self._pending)]
            except BrokenPipeError:
                self._pending.clear()
        if self._control.fileno() in ready:
            self._read_control()
        elif self._asked is not None:
            if now - self._asked > _GRACE_SECONDS:
                self._fail("did not answer in time")
        elif now >= self._next_check:
            self._control.sendall(b"C")
            self._asked = now

    def _read(self) -> None:
        assert self._answer is not None
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._answer, 1 << 16)
            self._reading = bool(data)
            self.output += data
            self._received += len(data)
        if self._received > self._jail.limits.output_mb * (1 << 20) and self._reading:
            self._reading = False
            self._order_kill("output")

    def _read_control(self) -> None:
        if self._control_message(1) == b"C":
            (self._cpu,) = CLOCK.unpack(self._control_message(CLOCK.size))
            self._asked, self._next_check = None, time.monotonic() + _CHECK_SECONDS
            self._check()
            return
        code, self._cpu = EXIT_RECORD.unpack(self._control_message(EXIT_RECORD.size))
        self.spent.cpu_seconds += self._cpu - self._cpu_before
        while self._reading:  # all writers have exited: read the rest
            before = self._received
            self._read()
            if self._received == before:
                break
        status = os.waitstatus_to_exitcode(code)
        died = f"signal {-status} after {self._cpu:.1f} s of processor time" if status < 0 else ""
        note = self._ordered or died or (f"exit code {status}" if status else "")
        self.exit = Exit(note, "time" in self._ordered)

    def _control_message(self, size: int) -> bytes:
        message = b""
        while len(message) < size:
            data = self._control.recv(size - len(message))
            if not data:
                self._fail("died")
            message += data
        return message

    def _check(self) -> None:
        """Order the kill of a process that exceeds a limit on time."""
        limits, spent = self._jail.limits, self.spent
        self._parse()
        cpu, wall = spent.cpu_seconds + self._cpu - self._cpu_before, spent.wall_seconds
        if self._mark is None or (self._mark[0] != self._messages and not self.is_live):
            self._mark = (self._messages, cpu, wall, time.monotonic())
        test_cpu, test_wall = cpu - self._mark[1], wall - self._mark[2]
        if self.is_live:  # the tests may wait for the end of an iterator
            test_wall = time.monotonic() - self._mark[3]
        total = max(limits.total_cpu_seconds, limits.cpu_seconds)
        asleep = wall > limits.wall_seconds and cpu < _BUSY_SHARE * wall
        if test_cpu > limits.cpu_seconds:
            self._order_kill(f"processor time: more than {limits.cpu_seconds:g} s in one test")
        elif cpu > total:
            self._order_kill(f"processor time: more than {total:g} s in all tests")
        elif (
            asleep
            or test_wall > limits.wall_seconds + _STARVED * limits.cpu_seconds
            or wall > limits.wall_seconds + _STARVED * total
        ):
            self._order_kill("wall time")

    def _order_kill(self, reason: str) -> None:
        self._ordered = self._ordered or reason
        self._control.sendall(b"K")

    def _fail(self, how: str) -> NoReturn:
        self._jail.close()
        raise EngineError(f"the sandbox's zygote {how}; the next call starts another", transient=True)

    def _close_job(self) -> None:
        if self._job is not None:
            os.close(self._job)
            self._job = None
