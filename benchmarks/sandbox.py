"""How many solutions per second does the sandbox judge? Beside a bare fork, fresh interpreters and
fresh bubblewraps.

    python -m benchmarks.sandbox [--rounds 5] [--out sandbox.json]

A solution has one small function and 20 assertions, as in LeetCodeDataset. Each way runs in its own
process on one core. Its cost is the processor time of that process and everything that it started,
beyond the cost of a single solution (which holds what is started once): on a busy machine it says
more than wall time. Numbers are seconds for each solution. The last case is the wall time of the
sandbox with one worker, two, and so on up to one for each core.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from benchmarks.harness import Case, Sample, command_line, compare, report, run_command
from qrpo.sandbox import CheckTests, Limits, Sandbox, Verdict
from qrpo.sandbox.isolator import find_bubblewrap

PREAMBLE = "".join(
    f"from {m} import *\n" for m in ("typing", "functools", "collections", "itertools", "heapq")
)
SOLUTION = """
import math

class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        seen = {}
        for place, number in enumerate(nums):
            if target - number in seen:
                return [seen[target - number], place]
            seen[number] = place
"""
TEST = "def check(candidate):\n" + "".join(
    f"    assert candidate(nums=[{n}, 7, 11, 15], target={n + 7}) == [0, 1]\n" for n in range(20)
)
WHOLE = f"{PREAMBLE}\n{SOLUTION}\n{TEST}\ncheck(Solution().twoSum)\n"
JOB = (SOLUTION, CheckTests(TEST, "Solution().twoSum", PREAMBLE))

# bubblewrap does not wait for the first process of its namespace; as its reaper this process counts
# that one's children, too
PR_SET_CHILD_SUBREAPER = 36


def bare_fork(count: int) -> None:
    """No isolation, no limits, and the solution sees the tests.

    Compiles the tests for every solution. The sandbox compiles them once per problem, so this is
    not the same work.
    """
    for _ in range(count):
        child = os.fork()
        if not child:
            exec(compile(WHOLE, "<solution>", "exec"), {})  # noqa: S102
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def fresh_process(count: int, *command: str) -> None:
    """The solution sees the tests; no limits."""
    for _ in range(count):
        subprocess.run([*command, "-c", WHOLE], check=True)


def fresh_bubblewrap(count: int) -> None:
    """Namespaces and a read-only view of the whole machine, no system-call filter."""
    isolation = (find_bubblewrap(), "--unshare-all", "--ro-bind", "/", "/", "--tmpfs", "/tmp")
    fresh_process(count, *isolation, sys.executable, "-I", "-S")


def sandbox(count: int, allow_unsandboxed: bool = False) -> None:
    """The code reward's way."""
    with Sandbox(Limits(), workers=1, allow_unsandboxed=allow_unsandboxed) as box:
        for verdict in box.judge([JOB] * count):
            assert isinstance(verdict, Verdict)
            assert verdict.all_passed


WAYS: dict[str, tuple[Callable[[int], None], int]] = {
    "bare fork": (bare_fork, 400),
    "sandbox": (sandbox, 400),
    "sandbox, unsandboxed": (partial(sandbox, allow_unsandboxed=True), 400),
    "fresh bubblewrap, python -I -S": (fresh_bubblewrap, 40),
    "fresh python": (lambda count: fresh_process(count, sys.executable), 20),
}


def judge(way: str, count: int) -> None:
    """Judge on one core, and wait for everything that was started."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    WAYS[way][0](count)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def per_solution(way: str, count: int) -> Sample:
    """Seconds for each solution after the first."""
    command = (sys.executable, "-m", "benchmarks.sandbox", "--way", way, "--count")
    one, many = (run_command(*command, str(number))[0] for number in (1, 1 + count))
    return {clock: (many[clock] - one[clock]) / count for clock in ("cpu", "wall")}


def with_workers(workers: int, count: int) -> Sample:
    """Wall seconds for each solution with that many workers."""
    with Sandbox(Limits(), workers=workers) as box:
        box.judge([JOB] * 4 * workers)
        started = time.perf_counter()
        box.judge([JOB] * count)
        return {"wall": (time.perf_counter() - started) / count}


def measure(rounds: int, scale: float) -> list[Case]:
    """Every way on one core, then the sandbox on all of them."""
    counts = {way: max(1, int(count * scale)) for way, (_, count) in WAYS.items()}
    ways = {way: partial(per_solution, way, count) for way, count in counts.items()}
    cores = range(1, len(os.sched_getaffinity(0)) + 1)
    by_workers = {f"workers: {n}": partial(with_workers, n, counts["sandbox"]) for n in cores}
    return [
        {"assertions": 20, "ways": compare(ways, rounds, "bare fork", untimed=0)},
        {"assertions": 20, "ways": compare(by_workers, rounds, "workers: 1", untimed=0)},
    ]


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of solutions")
    parser.add_argument("--way", choices=WAYS, help="judge in this process, on one core, without measuring")
    parser.add_argument("--count", type=int, default=1, help="solutions, with --way")
    options = parser.parse_args()
    assert shutil.which("bwrap"), "bubblewrap is not installed"
    if options.way:
        judge(options.way, options.count)
    else:
        report(options, measure(options.rounds, options.scale))
