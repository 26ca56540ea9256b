"""The zygote: an interpreter with all imports done, forked for every solution and every judge.

It never reads a job: a request is one byte and two file descriptors, which only the forked process
uses. So no forked process finds the data of another in its memory. Messages on its socket to the
host:

    from the host   b"R" and (job to read, answer to write)    fork; the forked process reads and
                    runs its job b"K"                                       kill it b"C"
                    how much processor time has it used?
    to the host     b"S"                                       ready
                    b"C" and a `CLOCK`                         that time
                    b"E" and an `EXIT_RECORD`                  it has exited, with all its threads

It serves one request after another and exits when the host closes the socket.
"""

import _sitebuiltins
import builtins
import contextlib
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
from .codec import encode
from .framing import Reader, write_frames
from .isolation import Isolation

CLOCK = struct.Struct("<d")
"""Processor seconds of the forked process, all its threads together."""
EXIT_RECORD = struct.Struct("<id")
"""`os.waitpid` status, processor seconds."""

_PREIMPORTED = """
    abc array bisect builtins cmath collections collections.abc contextlib copy dataclasses datetime decimal enum fractions
    functools heapq io itertools json math numbers operator queue random re statistics string sys textwrap threading time
    traceback types typing unittest.case unittest.suite
"""


def main(control: int, settings: str) -> None:
    """Serve requests over the socket `control` until it closes.

    `settings` is JSON: the limits; `packages`, their names, and the `path` to find them on; `bare`,
    for no isolation.
    """
    limits: dict[str, Any] = json.loads(settings)
    sys.path += limits["path"]
    for name in [*_PREIMPORTED.split(), *limits["packages"]]:
        importlib.import_module(name)
    isolation = Isolation(limits, bare=limits["bare"])
    host = socket.socket(fileno=control)
    for name in ("exit", "quit"):  # `site`, which is off, would define them
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    _warm_up()
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    gc.collect()
    gc.freeze()  # garbage collection in a forked process then leaves the shared pages alone
    host.sendall(b"S")
    for fd in (1, 2):  # errors of the start were printed there
        os.dup2(0, fd)
    while True:
        request, fds, _, _ = socket.recv_fds(host, 1, 2)
        if not request:
            return
        if request != b"R":  # a kill that arrived after the exit
            continue
        child = isolation.fork()
        if child == 0:
            _run_job(isolation, host, *fds)
        for fd in fds:
            os.close(fd)
        host.sendall(b"E" + _wait(child, host, limits["bare"]))


_PREAMBLE = """
from typing import *
from functools import *
from collections import *
from itertools import *
from heapq import *
"""
_SOLUTION = """
class Solution:
    def place(self, numbers: List[int], wanted: int) -> List[int]:
        seen = {}
        for i, number in enumerate(numbers):
            if number == wanted:
                return [seen.get(number, -1), i]
            seen[number] = i
"""


def _warm_up() -> None:
    """Run a solution's job a few times: Python then specializes instructions and fills caches once,
    in shared pages, and not again in every forked process."""
    call = encode(["entry", [], {"numbers": [3, 1, 2], "wanted": 2}])
    blocks = json.dumps([[_SOLUTION], ["Solution"]]).encode()
    preamble = marshal.dumps(compile(_PREAMBLE, "", "exec"))
    for _ in range(20):
        (job_read, job_write), (answer_read, answer_write) = os.pipe(), os.pipe()
        write_frames(job_write, preamble, blocks, b"Solution().place", b"in advance", *[call] * 8)
        os.close(job_write)
        solution.answer_calls(Reader(job_read), answer_write, lambda: None)
        for fd in (job_read, answer_read, answer_write):
            os.close(fd)
    del sys.modules["solution"]
    sys.stdout = sys.__stdout__


_ANSWER, _JOB = 3, 4
_ROLES = {"solution": solution.answer_calls, "program": solution.run_program, "judge": judge.serve}


def _run_job(isolation: Isolation, host: socket.socket, job: int, answer: int) -> None:
    """Run one job in the forked process and exit; never returns."""
    status = 1
    try:
        host.close()
        job, answer = os.dup2(job, 101), os.dup2(answer, 100)
        os.dup2(answer, _ANSWER)
        os.dup2(job, _JOB)
        os.closerange(5, 102)
        isolation.limit()
        jobs = Reader(_JOB)
        status = _ROLES[jobs.text()](jobs, _ANSWER, isolation.drop_privileges)
    except BaseException:  # roles handle errors of foreign code; nothing is printed
        status = 1
    finally:
        os._exit(status)


def _wait(child: int, host: socket.socket, bare: bool) -> bytes:
    """Wait for the child, serve the host's orders, and return the child's exit record."""
    handle = os.pidfd_open(child)
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    poller.register(host, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if handle in ready:
            break
        order = host.recv(1)
        if order == b"C":  # the child's exact clock, see clock_getcpuclockid(3)
            host.sendall(b"C" + CLOCK.pack(time.clock_gettime((~child << 3) | 2)))
            continue
        _kill(child, bare)
        if not order:
            os._exit(0)
    if bare:
        _kill(child, True)  # what it may have forked
    _, status, usage = os.wait4(child, 0)
    os.close(handle)
    return EXIT_RECORD.pack(status, usage.ru_utime + usage.ru_stime)


def _kill(child: int, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(child, signal.SIGKILL)
