"""Judge solutions with their tests, in as many jails in parallel as there are cores."""

import json
import logging
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, Self

from qrpo.errors import DataError, EngineError
from qrpo.sandbox.isolator import StartError, find_bubblewrap, find_packages
from qrpo.sandbox.jail import Exit, Jail, Job, Spent
from qrpo.sandbox.limits import Limits

logger = logging.getLogger(__name__)

_MAX_PREPARED = 4096  # problems whose prepared tests are cached
_MAX_JUDGEMENTS = 200  # judgements per judge process
_MAX_TIMEOUTS = 2  # tests of one solution that may exceed a limit on time; the others then fail


@dataclass(frozen=True, slots=True)
class CheckTests:
    """Tests about functions and classes, in a form that `qrpo.sandbox.inside.suite` describes."""

    test: str
    """Source. One test is a statement that asserts something, a test function's case or a test
    method."""
    entry_point: str
    """An expression for the callable among the solution's names: `add`, `Solution().twoSum`. Empty
    if the tests themselves name what they use."""
    preamble: str = ""
    """Source that precedes the solution, and the tests."""


@dataclass(frozen=True, slots=True)
class ProgramTests:
    """The expected output of a program for each input."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    compare: Literal["tokens", "lines"] = "tokens"
    """`tokens`: the words between white space, where a decimal number equals another one within the
    tolerance; `lines`: all characters but spaces at line ends and empty lines at the end."""
    tolerance: float = 1e-6
    """Absolute and relative tolerance of decimal numbers in `tokens`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which tests a solution passed."""

    passed: tuple[bool, ...]
    note: str = field(default="", compare=False)
    """Why the first test failed, for people: "wall time", "exit code 1", "line 3: AssertionError".
    If all passed: empty, or that the tests are weak."""

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
    """The tests of one problem, compiled by a judge."""

    tests: int
    weak: int
    """The number of tests that pass for any truthy value, as far as that is known."""
    entry_point: str
    wanted: list[str]
    bound: int
    """The number of the solution's names that the tests use."""
    suite: bytes
    preamble: bytes
    calls: tuple[bytes, ...] | None
    """The calls that are known in advance; None if they are made one by one."""

    @property
    def weakness(self) -> str:
        """What people should know about tests that any truthy value passes."""
        return f"weak tests: {self.weak} of {self.tests} pass for any truthy value" if self.weak else ""

    def zeros(self, note: str) -> Verdict:
        """No test passed."""
        return Verdict((False,) * self.tests, note)


class Sandbox:
    """Judges solutions, each in a new isolated process. Serves several threads; the first call
    starts the jails.

    Raises RewardError at once if bubblewrap is missing, unless `allow_unsandboxed`: then solutions
    run with all rights of this user, and a warning says so. Solutions may import `packages` besides
    the standard library. `workers` solutions run in parallel, by default one per core.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        packages: Sequence[str] = (),
        workers: int | None = None,
        allow_unsandboxed: bool = False,
    ):
        self.limits = limits or Limits()
        find_packages(packages)
        self._packages = packages
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

    def judge(
        self, solutions: Sequence[tuple[str | Sequence[str], CheckTests | ProgramTests]]
    ) -> list[Verdict | DataError]:
        """A verdict for each (code, tests); a DataError where the tests cannot be used.

        Code is a text or several blocks, of which the one that defines what the tests use is run
        whole, and from the others the definitions that it lacks.
        """
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="sandbox")
            pool = self._pool
        return list(pool.map(self._judge_one, *zip(*solutions, strict=True))) if solutions else []

    def close(self) -> None:
        """End every jail. A later call starts them again."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        while self._free:
            self._free.pop().close()

    def _judge_one(self, code: str | Sequence[str], tests: CheckTests | ProgramTests) -> Verdict | DataError:
        blocks = [code] if isinstance(code, str) else list(code)
        with self._lock:
            worker = self._free.pop() if self._free else _Worker(self.limits, self._packages, self._bare)
        try:
            for _ in range(2):  # solutions should not be able to make a jail fail: try once more
                try:
                    return self._judge_with(worker, blocks, tests)
                except StartError:
                    raise
                except EngineError as error:
                    failure = error
                    worker.close()
            return Verdict((False,), f"the sandbox failed twice on this solution: {failure}")
        finally:
            with self._lock:
                self._free.append(worker)

    def _judge_with(
        self, worker: "_Worker", blocks: list[str], tests: CheckTests | ProgramTests
    ) -> Verdict | DataError:
        if isinstance(tests, ProgramTests):
            if not tests.inputs or len(tests.inputs) != len(tests.outputs):
                return DataError(
                    f"got {len(tests.inputs)} inputs and {len(tests.outputs)} outputs, expected the same number, not 0"
                )
            return worker.run_program(blocks, tests)
        with self._lock:
            prepared = self._prepared.get(tests)
        if prepared is None:
            prepared = worker.prepare(tests)
            if isinstance(prepared, _Prepared) and prepared.weak:
                logger.warning(f"{prepared.weakness}: {tests.test.strip()[:200]!r}")
            with self._lock:
                self._prepared[tests] = prepared
                if len(self._prepared) > _MAX_PREPARED:
                    self._prepared.popitem(last=False)
        return prepared if isinstance(prepared, DataError) else worker.judge(blocks, prepared)


class _Worker:
    """Two jails: one runs solutions, the other judges, which see the tests."""

    def __init__(self, limits: Limits, packages: Sequence[str], bare: bool):
        self._solutions = Jail(limits, packages=packages, bare=bare)
        self._judges = Jail(limits, packages=packages, bare=bare)
        self._judge: Job | None = None  # serves many judgements of calls that are known in advance
        self._uses = 0
        self._timed_out = False  # the last judge that ended

    def close(self) -> None:
        self._judge = None
        self._solutions.close()
        self._judges.close()

    def prepare(self, tests: CheckTests) -> _Prepared | DataError:
        frames = self._ask("prepare", tests.preamble, tests.test, tests.entry_point)
        if not frames or frames[-1] != b".":
            return DataError("the tests cannot be prepared within the limits")
        facts = json.loads(frames[0])
        if facts["error"] is not None:
            return DataError(f"the tests cannot be used: {facts['error']}")
        named = {name: facts[name] for name in ("tests", "weak", "entry_point", "wanted", "bound")}
        calls = tuple(frames[3:-1]) if facts["calls"] else None
        return _Prepared(**named, suite=frames[1], preamble=frames[2], calls=calls)

    def judge(self, blocks: list[str], prepared: _Prepared) -> Verdict:
        if prepared.calls is not None and (verdict := self._judge_in_advance(blocks, prepared)) is not None:
            return verdict
        return self._judge_live(blocks, prepared)

    def _judge_in_advance(self, blocks: list[str], prepared: _Prepared) -> Verdict | None:
        """The verdict by calls known in advance; None if a result is not data, so that the tests
        must run live."""
        assert prepared.calls is not None
        calls, spent, replies, note, timeouts = prepared.calls, Spent(), list[bytes](), "", 0
        while len(replies) < len(calls):
            job = self._define(blocks, prepared, spent, *calls[len(replies) :], mode="in advance")
            result = job.finish()
            first, *more = job.frames or [b""]
            if first != b"=":
                return prepared.zeros(_undefined(first, result))
            if any(reply[:1] == b"?" for reply in more):
                return None
            replies += more[: len(calls) - len(replies)]
            if len(replies) == len(calls):
                break
            note = note or result.note or "the solution ended its process"
            timeouts += result.timed_out
            replies.append(b"x" + note.encode())
            if not result.timed_out or timeouts == _MAX_TIMEOUTS:
                break
        frames = self._ask("judge", prepared.suite, str(len(replies)), *replies)
        return _verdict(prepared, frames, note)

    def _judge_live(self, blocks: list[str], prepared: _Prepared) -> Verdict:
        """The verdict by calls that are made one by one."""
        spent, note, timeouts = Spent(), "", 0
        opening: list[bytes] = []
        solution = self._define(blocks, prepared, spent)
        first = solution.next_frame()
        if first != b"=":
            solution.kill()
            return prepared.zeros(_undefined(first or b"", solution.exit))

        def reply(request: bytes) -> bytes:
            nonlocal solution, note, timeouts
            if solution.exit is not None and 0 < timeouts < _MAX_TIMEOUTS:  # go on with the next test
                solution = self._define(blocks, prepared, spent, *opening)
                for _ in range(1 + len(opening)):
                    solution.next_frame()
            if len(opening) < prepared.bound:
                opening.append(request)
            solution.is_live = True
            solution.begin(new_test=b'["call"' in request[:40])  # an iterator may have no end
            solution.send(request)
            found = solution.next_frame()
            if found is None:
                assert solution.exit is not None
                note = note or solution.exit.note or "the solution ended its process"
                timeouts = timeouts + 1 if solution.exit.timed_out else _MAX_TIMEOUTS
            return b"x" + note.encode() if found is None else found

        try:
            return _verdict(prepared, self._ask("judge", prepared.suite, "0", reply=reply), note)
        finally:
            solution.kill()

    def _define(
        self, blocks: list[str], prepared: _Prepared, spent: Spent, *requests: bytes, mode: str = "live"
    ) -> Job:
        defined = (prepared.preamble, json.dumps([blocks, prepared.wanted]), prepared.entry_point)
        return self._solutions.start("solution", *defined, mode, *requests, spent=spent)

    def run_program(self, blocks: list[str], tests: ProgramTests) -> Verdict:
        spent, note, timeouts = Spent(), "", 0
        passed: list[bool] = []
        for text, expected in zip(tests.inputs, tests.outputs, strict=True):
            if timeouts == _MAX_TIMEOUTS:
                passed.append(False)
                continue
            job = self._solutions.start("program", json.dumps(blocks), text, spent=spent)
            result = job.finish()
            timeouts += result.timed_out
            printed = job.output.decode(errors="replace")
            passed.append(not result.note and _same_output(printed, expected, tests))
            if not passed[-1]:
                note = note or result.note or f"test {len(passed)}: another output than expected"
        return Verdict(tuple(passed), note)

    def _ask(self, *messages: bytes | str, reply: Callable[[bytes], bytes] | None = None) -> list[bytes]:
        """The messages of a judge's answer; the last is b"." unless the process exited before.

        A judge that calls the solution itself, by `reply`, serves this judgement alone.
        """
        if self._uses >= _MAX_JUDGEMENTS or reply is not None:
            self._end_judge()
        is_new = self._judge is None
        frames = self._answer(messages, reply)
        if reply is not None:
            self._end_judge()
        elif frames[-1:] != [b"."] and not (is_new or self._timed_out):  # it may have had no memory left
            frames = self._answer(messages, None)
        return frames

    def _answer(self, messages: Sequence[bytes | str], reply: Callable[[bytes], bytes] | None) -> list[bytes]:
        if self._judge is None:
            self._judge, self._uses = self._judges.start("judge"), 0
        self._uses += 1
        self._judge.begin(Spent())
        self._judge.send(*messages)
        frames: list[bytes] = []
        while frames[-1:] != [b"."]:
            message = self._judge.next_frame()
            if message is None:
                self._timed_out = self._judge.exit is not None and self._judge.exit.timed_out
                self._end_judge()
                break
            if message[:1] == b"c" and reply is not None:
                self._judge.send(reply(message[1:]))
                self._judge.begin()
            else:
                frames.append(message)
        return frames

    def _end_judge(self) -> None:
        judge, self._judge = self._judge, None
        if judge is not None:
            judge.kill()


def _verdict(prepared: _Prepared, frames: Sequence[bytes], note: str) -> Verdict:
    said = [message for message in frames if message[:1] in (b"0", b"1")]
    passed = [message == b"1" for message in said]
    reasons = [message[1:].decode(errors="replace") for message in said if message[:1] == b"0"]
    if len(passed) < prepared.tests:
        reasons.append("the tests did not end within the limits on what the solution returned")
    passed += [False] * (prepared.tests - len(passed))
    return Verdict(tuple(passed), prepared.weakness if all(passed) else note or reasons[0])


def _same_output(printed: str, expected: str, tests: ProgramTests) -> bool:
    if tests.compare == "lines":
        return _lines(printed) == _lines(expected)
    ours, theirs = printed.split(), expected.split()
    return len(ours) == len(theirs) and all(
        a == b or _close(a, b, tests.tolerance) for a, b in zip(ours, theirs, strict=True)
    )


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _close(printed: str, expected: str, tolerance: float) -> bool:
    """Whether two numbers are equal; within the tolerance if the expected one is not an integer."""
    if max(len(printed), len(expected)) > 400 or not (
        _NUMBER.fullmatch(printed) and _NUMBER.fullmatch(expected)
    ):
        return False
    if not {".", "e", "E"} & {*printed, *expected}:
        return False  # integers are compared to the letter
    ours, theirs = float(printed), float(expected)
    if not {".", "e", "E"} & {*expected}:
        return ours == theirs and Decimal(printed) == Decimal(expected)
    return math.isfinite(theirs) and abs(ours - theirs) <= tolerance * max(1.0, abs(theirs))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.replace("\r\n", "\n").rstrip().split("\n")]


def _undefined(first: bytes, result: Exit | None) -> str:
    said = first[1:].decode(errors="replace") if first[:1] == b"!" else ""
    reason = said or (result.note if result else "") or "its process ended"
    return f"the solution cannot be defined: {reason}"
