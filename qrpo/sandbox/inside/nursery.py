"""The warm interpreter that is forked once for every solution, and for every judge.

It has imported what solutions use, and reads nothing that concerns one: a request is one byte and two file descriptors,
which only the fork uses. So no fork finds in its memory what another one was given. Over its socket to the host:

    from the host   b"R" and (job to read, place to answer)    fork; the fork reads its job and does it
                    b"K"                                       kill it
    to the host     b"S"                                       ready
                    b"E" and an `Ended`                        it has ended, and so have all its threads

It serves one request after another, and ends when the host's end of the socket closes.
"""

import gc
import importlib
import json
import marshal
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

from . import judge, solution
from .cell import Cells
from .codec import encode
from .framing import Reader, write_frames

__all__ = ["BUSY_SHARE", "ENDED", "main"]

ENDED = struct.Struct("<icd")
"""Exit status as `os.waitpid` gives it; b"w" if its wall time had run out, else b"-"; CPU seconds."""

_PREIMPORTED = """
    abc array bisect builtins cmath collections collections.abc contextlib copy dataclasses datetime decimal enum fractions
    functools heapq io itertools json math numbers operator queue random re statistics string sys textwrap threading time
    traceback types typing
"""

BUSY_SHARE = 0.05
"""A solution whose wall time is over goes on while it has had this share of it as CPU time: it is no sleeper, but starved
by a busy machine. Its CPU limit ends it, after that limit divided by this share at the latest."""


def main(control: int, settings: str) -> None:
    """Serve requests over the socket `control` until it closes.

    `settings` is JSON: the limits; `packages`, their names, and the `path` to find them on; `bare`, for no isolation.
    """
    limits: dict[str, Any] = json.loads(settings)
    sys.path += limits["path"]
    for name in [*_PREIMPORTED.split(), *limits["packages"]]:
        importlib.import_module(name)
    cells = Cells(limits, bare=limits["bare"])
    host = socket.socket(fileno=control)
    _rehearse()
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    gc.collect()
    gc.freeze()  # so that a collection in the fork touches none of what it shares
    host.sendall(b"S")
    for fd in (1, 2):  # until here they told what went wrong
        os.dup2(0, fd)
    while True:
        request, fds, _, _ = socket.recv_fds(host, 1, 2)
        if not request:
            return
        if request != b"R":  # a kill that came after the end
            continue
        child = cells.fork()
        if child == 0:
            _become_cell(cells, host, *fds)
        for fd in fds:
            os.close(fd)
        host.sendall(b"E" + _wait(child, host, limits))


_REHEARSAL = (
    """
from typing import *
from functools import *
from collections import *
from itertools import *
from heapq import *
""",
    """
class Solution:
    def place(self, numbers: List[int], wanted: int) -> List[int]:
        seen = {}
        for i, number in enumerate(numbers):
            if number == wanted:
                return [seen.get(number, -1), i]
            seen[number] = i
""",
    "Solution().place",
)


def _rehearse() -> None:
    """Do a solution's job here, some times: what Python learns by doing (its specialized instructions, its caches) lies in
    pages that every cell would otherwise write to, and learn again."""
    preamble, code, entry_point = _REHEARSAL
    call = encode([[], {"numbers": [3, 1, 2], "wanted": 2}])
    job = [
        marshal.dumps(compile(preamble, "", "exec")),
        code.encode(),
        entry_point.encode(),
        b"8",
        *[call] * 8,
    ]
    for _ in range(20):
        (job_read, job_write), (answer_read, answer_write) = os.pipe(), os.pipe()
        write_frames(job_write, *job)
        os.close(job_write)
        solution.call(Reader(job_read), answer_write, lambda: None)
        for fd in (job_read, answer_read, answer_write):
            os.close(fd)
    del sys.modules["solution"]


def _become_cell(cells: Cells, host: socket.socket, job: int, answer: int) -> None:
    """Do one job and exit; never returns."""
    status = 1
    try:
        host.close()
        _arrange(job, answer)
        cells.enter()
        jobs = Reader(_JOB)
        role = {"solution": solution.call, "program": solution.run_program, "judge": judge.serve}[jobs.text()]
        status = role(jobs, _ANSWER, cells.seal)
    except BaseException:  # foreign code has handlers of its own before this; nothing is printed anywhere
        status = 1
    finally:
        os._exit(status)


_ANSWER, _JOB = 3, 4


def _arrange(job: int, answer: int) -> None:
    """Put the answer at descriptor 3, the job at 4, and close everything after them. At 0 to 2 is nothing already."""
    job, answer = os.dup2(job, 101), os.dup2(answer, 100)
    os.dup2(answer, _ANSWER)
    os.dup2(job, _JOB)
    os.closerange(5, 102)


def _wait(child: int, host: socket.socket, limits: dict[str, Any]) -> bytes:
    """Wait for the child, kill it where it is time to, and say how it ended."""
    started = time.monotonic()
    wall, reason = float(limits["wall_seconds"]), b"-"
    deadline = started + wall
    handle = os.pidfd_open(child)
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    poller.register(host, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)}
        if handle in ready:
            break
        if host.fileno() in ready:
            order = host.recv(1)
            _kill(child, limits["bare"])
            if not order:
                os._exit(0)
        elif (now := time.monotonic()) >= deadline:
            used = time.clock_gettime((~child << 3) | 2)  # the child's CPU clock, see clock_getcpuclockid(3)
            if used > BUSY_SHARE * (now - started):
                deadline = now + wall
            else:
                reason = b"w"
                deadline = now + 3600
                _kill(child, limits["bare"])
    if limits["bare"]:
        _kill(child, True)  # what it may have forked
    _, status, usage = os.wait4(child, 0)
    os.close(handle)
    return ENDED.pack(status, reason, usage.ru_utime + usage.ru_stime)


def _kill(child: int, group: bool) -> None:
    try:
        if group:
            os.killpg(child, signal.SIGKILL)
        else:
            os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
