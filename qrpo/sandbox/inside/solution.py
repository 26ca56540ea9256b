"""Run a solution: answer calls, or run it as a program. It never sees a test."""

import atexit
import builtins
import marshal
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from .codec import CodecError, decode, encode
from .framing import Reader, write_frames

__all__ = ["call", "run_program"]


def call(jobs: Reader, answer: int, drop_privileges: Callable[[], None]) -> int:
    """Define the solution and answer calls to its entry point, in order.

    The job: preamble (compiled), code, entry point, the number of calls, the calls; then, where
    that number is -1, calls one by one until the pipe ends. A call is `encode([args, kwargs])`. The
    answer is b"=" and the result, or b"!" and the exception; to one of the later calls, the result
    and the arguments as the call left them.
    """
    preamble, code, entry_point = jobs.frame(), jobs.text(), jobs.text()
    count = int(jobs.text())
    calls = [jobs.frame() for _ in range(count)]
    drop_privileges()
    sys.setrecursionlimit(10_000)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = module.__dict__
    exec(marshal.loads(preamble), names)  # noqa: S102, S302 - from a judge
    exec(compile(code, "<solution>", "exec"), names)  # noqa: S102
    candidate = eval(entry_point, names)  # noqa: S307
    for data in calls:
        write_frames(answer, _answer(candidate, data, names, back=False))
    while count < 0:
        try:
            data = jobs.frame()
        except EOFError:
            break
        write_frames(answer, _answer(candidate, data, names, back=True))
    return 0


def _answer(candidate: Any, data: bytes, names: dict[str, Any], *, back: bool) -> bytes:
    args, kwargs = decode(data, names.get)
    try:
        result = candidate(*args, **kwargs)
        return b"=" + encode([result, args, kwargs] if back else result)
    except Exception as error:
        known = [kind.__name__ for kind in type(error).__mro__ if hasattr(builtins, kind.__name__)]
        name = "TypeError" if isinstance(error, CodecError) else known[0]
        return b"!" + encode([name, str(error)[:1000]])


def run_program(jobs: Reader, answer: int, drop_privileges: Callable[[], None]) -> int:
    """Run the code as `__main__` with text on standard input; its output is the answer."""
    code, text = jobs.text(), jobs.frame()
    given = os.memfd_create("stdin")
    with open(given, "wb", closefd=False) as file:
        file.write(text)
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    os.dup2(answer, 1)
    os.closerange(3, given + 1)
    drop_privileges()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.setrecursionlimit(10_000)
    sys.argv = ["main.py"]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    status = 0
    try:
        exec(compile(code, "main.py", "exec"), module.__dict__)  # noqa: S102
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status & 0xFF
