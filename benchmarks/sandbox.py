"""How many solutions a second does the sandbox judge? Beside a bare fork, fresh interpreters and fresh bubblewraps.

    python benchmarks/sandbox.py [--runs 5] [--out sandbox.json]

A solution has one small function and 20 assertions, as LeetCodeDataset writes them. Each way runs in a process of its own
that is bound to one core, interleaved with the others. Its cost is the processor time of that process and of all that it
started, user and system, beyond what a single solution costs (which holds what is started once): on a busy machine it
says more than the clock. The rate per core is its inverse; the clock's rate is given, too. `sandbox_by_workers` is the
clock's rate with one worker, two, and so on up to one a core.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qrpo.sandbox import CheckTests, Limits, Sandbox, Verdict
from qrpo.sandbox.isolator import find_bubblewrap

PREAMBLE = "from typing import *\nfrom functools import *\nfrom collections import *\nfrom itertools import *\nfrom heapq import *\nimport math\n"
SOLUTION = """
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


def bare_fork(count: int) -> None:
    """No isolation, no limits, and the solution sees the tests."""
    for _ in range(count):
        child = os.fork()
        if not child:
            exec(compile(WHOLE, "<solution>", "exec"), {})  # noqa: S102
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def fresh_python(count: int) -> None:
    """No isolation, and the solution sees the tests."""
    for _ in range(count):
        subprocess.run([sys.executable, "-c", WHOLE], check=True)


def fresh_bubblewrap(count: int) -> None:
    """Namespaces and a read-only view of the whole machine; no limits, no filter, and the solution sees the tests."""
    command = [
        find_bubblewrap(),
        "--unshare-all",
        "--ro-bind",
        "/",
        "/",
        "--tmpfs",
        "/tmp",
        sys.executable,
        "-I",
        "-S",
    ]
    for _ in range(count):
        subprocess.run([*command, "-c", WHOLE], check=True)


def sandbox(count: int, *, workers: int = 1, bare: bool = False) -> None:
    """The code reward's way."""
    with Sandbox(Limits(), workers=workers, allow_unsandboxed=bare) as sandbox:
        job = (SOLUTION, CheckTests(TEST, "Solution().twoSum", PREAMBLE))
        for verdict in sandbox.judge([job] * count):
            assert isinstance(verdict, Verdict)
            assert verdict.all_passed


WAYS: dict[str, tuple[Callable[[int], None], int]] = {
    "bare fork": (bare_fork, 400),
    "sandbox": (sandbox, 400),
    "sandbox, unsandboxed": (lambda count: sandbox(count, bare=True), 400),
    "fresh bubblewrap, python -I -S": (fresh_bubblewrap, 40),
    "fresh python": (fresh_python, 20),
}


# bubblewrap does not wait for the first process of its namespace: with this, what that and its children used counts, too
_PR_SET_CHILD_SUBREAPER = 36


def measure(way: str, count: int) -> tuple[float, float]:
    """(processor seconds, seconds on the clock) of a process that judges so many solutions, on one core."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, __file__, "--way", way, "--count", str(count)], stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"{way}: exit code {child.returncode}"
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def scaling(workers: int, count: int) -> float:
    """Solutions a second on the clock with so many workers, on as many cores as there are."""
    with Sandbox(Limits(), workers=workers) as sandbox:
        job = (SOLUTION, CheckTests(TEST, "Solution().twoSum", PREAMBLE))
        sandbox.judge([job] * 4 * workers)
        started = time.perf_counter()
        sandbox.judge([job] * count)
        return count / (time.perf_counter() - started)


def main() -> None:
    """Measure everything and print a table, or one way for `measure`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way")
    parser.add_argument("--count", type=int)
    arguments = parser.parse_args()
    if arguments.way:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        WAYS[arguments.way][0](arguments.count)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        return
    assert shutil.which("bwrap"), "bubblewrap is not installed"
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    clock: dict[str, list[float]] = {way: [] for way in WAYS}
    cores = len(os.sched_getaffinity(0))
    scaled: dict[int, list[float]] = {workers: [] for workers in range(1, cores + 1)}
    for _ in range(arguments.runs):
        for way, (_, count) in WAYS.items():
            one, many = measure(way, 1), measure(way, 1 + count)
            cpu[way].append((many[0] - one[0]) / count)
            clock[way].append((many[1] - one[1]) / count)
        for workers, rates in scaled.items():
            rates.append(scaling(workers, 400))
    rows: dict[str, Any] = {}
    for way, seconds in cpu.items():
        overheads = [mine / bare for mine, bare in zip(seconds, cpu["bare fork"], strict=True)]
        rows[way] = {
            "cpu_ms": [round(1e3 * s, 3) for s in seconds],
            "per_core_and_second": round(1 / statistics.median(seconds), 1),
            "per_second_on_the_clock": round(1 / statistics.median(clock[way]), 1),
            "times_the_bare_fork": round(statistics.median(overheads), 2),
        }
        print(f"{way:32}", {k: v for k, v in rows[way].items() if k != "cpu_ms"})
    result = {
        "cpus": cores,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernel": platform.release().split("-")[0],
        "runs": arguments.runs,
        "asserts": 20,
        "ways": rows,
        "sandbox_by_workers": {
            workers: {
                "per_second_on_the_clock": round(statistics.median(rates), 1),
                "times_one_worker": round(
                    statistics.median(more / one for more, one in zip(rates, scaled[1], strict=True)), 2
                ),
                "all": [round(rate, 1) for rate in rates],
            }
            for workers, rates in scaled.items()
        },
    }
    print(json.dumps(result["sandbox_by_workers"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
