"""Runs that are killed at a crash point of the store, and what they leave behind."""

import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from storage.crashpoints import on_crash_point

Report = Callable[[str], object]


def in_fork(
    work: Callable[[Report], object],
    kill_at: int | None = None,
    before_kill: Callable[[], object] | None = None,
    kill_with: int = signal.SIGKILL,
) -> tuple[int, list[str]]:
    """Run `work(report)` in a fork, which kills itself at its crash point number `kill_at`, counted from 0.

    `kill_with` is the signal. Returns the exit code (0, 1, or minus the signal) and the reported lines, of which the last is
    "@NAME KEY" of the point of the kill, or the number of points. The points of leases do not count:
    a thread reaches them at any time.
    """
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            points = 0

            def report(line: str) -> None:
                os.write(file.fileno(), f"{line}\n".encode())

            def listener(name: str, key: str) -> None:
                nonlocal points
                if key.startswith("leases/"):
                    return
                if points == kill_at:
                    if before_kill is not None:
                        before_kill()
                    report(f"@{name} {key}")
                    os.kill(os.getpid(), kill_with)
                points += 1

            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
                on_crash_point(listener)
                work(report)
                report(str(points))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        return os.waitstatus_to_exitcode(status), file.read().decode().splitlines()


def timeless(value: Any, *more: str) -> Any:
    """A record, manifest or run as JSON values, without its times, its checksum and the fields `more`."""
    if isinstance(value, dict):
        skipped = {"created", "seconds", "updated", "sha256", *more}
        return {key: timeless(item, *more) for key, item in value.items() if key not in skipped}
    return [timeless(item, *more) for item in value] if isinstance(value, list) else value
