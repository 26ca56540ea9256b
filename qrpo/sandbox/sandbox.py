"""Solutions and their tests in, verdicts out, over as many jails as there are cores to use."""

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from qrpo.errors import DataError, EngineError
from qrpo.sandbox.inside.framing import complete_frames
from qrpo.sandbox.isolator import find_bubblewrap
from qrpo.sandbox.jail import Ended, Jail
from qrpo.sandbox.limits import Limits

__all__ = ["CheckTests", "ProgramTests", "Sandbox", "Verdict"]

logger = logging.getLogger(__name__)

_PREPARED = 4096  # problems whose prepared tests are kept


@dataclass(frozen=True, slots=True)
class CheckTests:
    """Assertions about a callable: `def check(candidate)`, as in LeetCodeDataset and HumanEval, or bare `assert`s."""

    test: str
    """Source. Each statement of `check` that asserts something is one test."""
    entry_point: str
    """An expression for the callable in the solution's names: `add`, `Solution().twoSum`."""
    preamble: str = ""
    """Source that comes before the solution, and before the tests."""


@dataclass(frozen=True, slots=True)
class ProgramTests:
    """What a program should print for each text on its standard input; blanks at the ends of lines do not count."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which tests a solution passed."""

    passed: tuple[bool, ...]
    note: str = ""
    """Why it did not come to its end, for people: "exit code 1", "SIGKILL", "wall time", "output"; else empty."""

    @property
    def share(self) -> float:
        """Share of the tests that passed."""
        return sum(self.passed) / len(self.passed)

    @property
    def all_passed(self) -> bool:
        """Whether every test passed."""
        return all(self.passed)


@dataclass(frozen=True, slots=True)
class _Prepared:
    tests: int
    calls: tuple[bytes, ...]
    live: bool


class Sandbox:
    """Judges solutions, each in a cell of its own. Serves several threads; started by the first call.

    Raises RewardError at once where bubblewrap is missing, unless `allow_unsandboxed`: then solutions run with all
    rights of this user, and a warning says so. `workers` is how many run at once, by default one a core.
    """

    def __init__(
        self, limits: Limits | None = None, *, workers: int | None = None, allow_unsandboxed: bool = False
    ):
        self.limits = limits or Limits()
        self._bare = allow_unsandboxed
        if allow_unsandboxed:
            logger.warning(
                "allow_unsandboxed: code that a model wrote RUNS WITH ALL RIGHTS OF THIS USER: it can read and delete files, "
                "use the network and start processes. Only limits on time, memory and file size hold."
            )
        else:
            find_bubblewrap()
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool: ThreadPoolExecutor | None = None
        self._free: list[_Worker] = []
        self._prepared: OrderedDict[CheckTests, _Prepared | DataError] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def judge(self, solutions: Sequence[tuple[str, CheckTests | ProgramTests]]) -> list[Verdict | DataError]:
        """A verdict for each (code, tests), in order; DataError in the place of one whose tests cannot be used."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="sandbox")
            pool = self._pool
        return list(pool.map(self._judge_one, solutions))

    def close(self) -> None:
        """End every jail. A later call starts them again."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        while self._free:
            self._free.pop().close()

    def _judge_one(self, solution: tuple[str, CheckTests | ProgramTests]) -> Verdict | DataError:
        with self._lock:
            worker = self._free.pop() if self._free else _Worker(self.limits, self._bare)
        try:
            return self._judged(worker, *solution)
        except EngineError:  # not the solution's doing, which cannot reach the nursery: once more, afresh
            worker.close()
            return self._judged(worker, *solution)
        finally:
            with self._lock:
                self._free.append(worker)

    def _judged(self, worker: "_Worker", code: str, tests: CheckTests | ProgramTests) -> Verdict | DataError:
        if isinstance(tests, ProgramTests):
            if not tests.inputs or len(tests.inputs) != len(tests.outputs):
                return DataError(
                    f"got {len(tests.inputs)} inputs and {len(tests.outputs)} outputs, expected as many, and some"
                )
            return worker.run_program(code, tests)
        with self._lock:
            prepared = self._prepared.get(tests)
        if prepared is None:
            prepared = worker.prepare(tests)
            with self._lock:
                self._prepared[tests] = prepared
                if len(self._prepared) > _PREPARED:
                    self._prepared.popitem(last=False)
        return prepared if isinstance(prepared, DataError) else worker.judge(code, tests, prepared)


class _Worker:
    """Two jails: in one solutions run, in the other their judges, which see the tests and run no solution."""

    def __init__(self, limits: Limits, bare: bool):
        self._solutions, self._judges = Jail(limits, bare=bare), Jail(limits, bare=bare)

    def close(self) -> None:
        self._solutions.close()
        self._judges.close()

    def prepare(self, tests: CheckTests) -> _Prepared | DataError:
        job = self._judges.start("judge", "prepare", tests.preamble, tests.test, tests.entry_point)
        ended = job.finish()
        frames = complete_frames(job.output, 1 << 30)
        if not frames:
            return DataError(f"the tests cannot be prepared: {_note(ended) or 'no answer'}")
        facts = json.loads(frames[0])
        if facts["error"] is not None:
            return DataError(f"the tests cannot be used: {facts['error']}")
        if len(frames) - 1 < facts["calls"]:
            return DataError(f"the tests cannot be prepared: their calls pass the limits ({_note(ended)})")
        return _Prepared(facts["tests"], tuple(frames[1:]), live=facts["calls"] < 0)

    def judge(self, code: str, tests: CheckTests, prepared: _Prepared) -> Verdict:
        count = -1 if prepared.live else len(prepared.calls)
        solution = self._solutions.start(
            "solution", tests.preamble, code, tests.entry_point, str(count), *prepared.calls
        )
        replies: list[bytes] = []
        try:
            if not prepared.live:
                solution.finish()
                replies = complete_frames(solution.output, len(prepared.calls))
            judge = self._judges.start(
                "judge", "judge", tests.preamble, tests.test, tests.entry_point, str(len(replies)), *replies
            )
            try:
                asked = place = 0
                while prepared.live and (message := judge.next_frame(place)) is not None:
                    place += 1
                    if message[:1] == b"c":
                        solution.send(message[1:])
                        reply = solution.next_frame(asked)
                        asked += 1
                        judge.send(_GONE if reply is None else reply)
                judge.finish()
            finally:
                judge.abandon()
        finally:
            solution.abandon()
        verdicts = [m == b"1" for m in complete_frames(judge.output, 1 << 30) if m[:1] != b"c"]
        verdicts = verdicts[: prepared.tests]
        assert solution.ended is not None
        note = "" if prepared.live else _note(solution.ended)
        return Verdict((*verdicts, *[False] * (prepared.tests - len(verdicts))), note)

    def run_program(self, code: str, tests: ProgramTests) -> Verdict:
        passed, note = [], ""
        for text, expected in zip(tests.inputs, tests.outputs, strict=True):
            job = self._solutions.start("program", code, text)
            ended = job.finish()
            note = note or _note(ended)
            passed.append(
                ended.status == 0 and _lines(job.output.decode(errors="replace")) == _lines(expected)
            )
        return Verdict(tuple(passed), note)


_GONE = b'!["RuntimeError",[]]'


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _note(ended: Ended) -> str:
    if ended.reason:
        return ended.reason
    if ended.status < 0:
        return f"signal {-ended.status} after {ended.cpu_seconds:.1f} s of processor time"
    return f"exit code {ended.status}" if ended.status else ""
