"""Wait for what happens elsewhere, and look at the processes of this machine."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


def eventually(
    condition: Callable[[], T],
    what: str,
    *,
    seconds: float = 400.0,
    every: float = 0.05,
    log: Path | None = None,
    process: "subprocess.Popen[bytes] | None" = None,
) -> T:
    """The first true value of `condition`. Fails, with the end of `log`, if it takes longer or if `process` ends first."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process is None or process.poll() is None, f"the process ended before {what}{_tail(log)}"
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds:.0f} s{_tail(log)}"
        time.sleep(every)
    return value


def _tail(log: Path | None) -> str:
    return f":\n{log.read_text()[-4000:]}" if log else ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[Any], log: Path, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in its own process group while the block runs, its output appended to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Process(NamedTuple):
    """A living process. Two of them are equal only if they are the same process, not two with the same id."""

    pid: int
    parent: int
    started: str
    command: str

    @property
    def serves_a_child(self) -> bool:
        """Whether this is a child that holds an engine, a model or a reward function."""
        return "qrpo.processes.serving" in self.command


def processes() -> list[Process]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if fields[0] not in "ZX":
            found.append(Process(int(folder.name), int(fields[1]), fields[19], command))
    return found


def descendants(root: int) -> list[Process]:
    """Every process below this one."""
    everything = processes()
    below, found = {root}, []
    while more := [one for one in everything if one.parent in below and one.pid not in below]:
        below |= {one.pid for one in more}
        found += more
    return found


def engine_of(parent: int) -> Process:
    """The child of a process that serves an engine or a reward, as soon as there is one."""

    def serving() -> list[Process]:
        found = processes()
        assert any(one.pid == parent for one in found), "the parent has ended"
        return [one for one in found if one.parent == parent and one.serves_a_child]

    return eventually(serving, "the start of an engine", seconds=120)[0]


def survivors(of: list[Process], seconds: float = 60.0) -> list[str]:
    """The commands of those processes that still live after this time; returns at once when all have ended."""
    watched = {(one.pid, one.started): one.command for one in of}
    deadline = time.monotonic() + seconds
    while True:
        alive = {(one.pid, one.started) for one in processes()}
        left = [command for key, command in watched.items() if key in alive]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def are_gone(pids: list[int], seconds: float = 60.0) -> bool:
    """Whether all these processes end within some seconds."""
    deadline = time.monotonic() + seconds
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return all(map(is_gone, pids))


def is_gone(pid: int) -> bool:
    """Whether the process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
