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
from qrpo.sandbox.isolator import find_bubblewrap, find_packages
from qrpo.sandbox.jail import Exit, Jail, Job, Spent, StartError
from qrpo.sandbox.limits import Limits

__all__ = ["CheckTests", "ProgramTests", "Sandbox", "Verdict"]

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
    """Why the first test failed, for people: "wall time", "exit code 1", "line 3: AssertionError";
    empty if all passed."""

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
    entry_point: str
    wanted: list[str]
    bound: int
    """The number of the solution's names that the tests use."""
    suite: bytes
    preamble: bytes
    calls: tuple[bytes, ...] | None
    """The calls that are known in advance; None if they are made one by one."""

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
        self._prepared: OrderedDict[tuple[CheckTests, bool], _Prepared | DataError] = OrderedDict()
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
            worker = self._free.pop() if self._free else self._new_worker()
        try:
            return self._judge_with(worker, blocks, tests)
        except (
            EngineError
        ):  # a failure of the jail, which solutions should not cause: try once more in new jails
            worker.close()
            try:
                return self._judge_with(worker, blocks, tests)
            except StartError:
                raise
            except EngineError as error:
                worker.close()
                return Verdict((False,), f"the sandbox failed twice on this solution: {error}")
        finally:
            with self._lock:
                self._free.append(worker)

    def _new_worker(self) -> "_Worker":
        jails = [Jail(self.limits, packages=self._packages, bare=self._bare) for _ in range(2)]
        return _Worker(*jails)

    def _judge_with(
        self, worker: "_Worker", blocks: list[str], tests: CheckTests | ProgramTests
    ) -> Verdict | DataError:
        if isinstance(tests, ProgramTests):
            if not tests.inputs or len(tests.inputs) != len(tests.outputs):
                return DataError(
                    f"got {len(tests.inputs)} inputs and {len(tests.outputs)} outputs, expected the same number, not 0"
                )
            return worker.run_program(blocks, tests)
        prepared = self._prepare(worker, tests, live=False)
        if isinstance(prepared, DataError):
            return prepared
        if prepared.calls is not None:
            verdict = worker.judge(blocks, prepared, prepared.calls)
            if verdict is not None:
                return verdict
            prepared = self._prepare(worker, tests, live=True)
        return prepared if isinstance(prepared, DataError) else worker.judge_live(blocks, prepared)

    def _prepare(self, worker: "_Worker", tests: CheckTests, *, live: bool) -> _Prepared | DataError:
        key = (tests, live)
        with self._lock:
            prepared = self._prepared.get(key)
        if prepared is None:
            prepared = worker.prepare(tests, live=live)
            with self._lock:
                self._prepared[key] = prepared
                if len(self._prepared) > _MAX_PREPARED:
                    self._prepared.popitem(last=False)
        return prepared


class _Worker:
    """Two jails: one runs solutions, the other judges, which see the tests."""

    def __init__(self, solutions: Jail, judges: Jail):
        self._solutions = solutions
        self._judge = _Judge(judges)

    def close(self) -> None:
        self._solutions.close()
        self._judge.close()

    def prepare(self, tests: CheckTests, *, live: bool) -> _Prepared | DataError:
        asked = ("prepare", tests.preamble, tests.test, tests.entry_point, "live" if live else "")
        frames = self._judge.ask(*asked)
        if not frames or frames[-1] != b".":
            return DataError("the tests cannot be prepared within the limits")
        facts = json.loads(frames[0])
        if facts["error"] is not None:
            return DataError(f"the tests cannot be used: {facts['error']}")
        calls = None if facts["calls"] is None else tuple(frames[3:-1])
        named = (facts["tests"], facts["entry_point"], facts["wanted"], facts["bound"])
        return _Prepared(*named, frames[1], frames[2], calls)

    def judge(self, blocks: list[str], prepared: _Prepared, calls: Sequence[bytes]) -> Verdict | None:
        """The verdict by calls known in advance; None if a result is not data, so that the tests
        must run live."""
        spent, replies, note, timeouts = Spent(), list[bytes](), "", 0
        while len(replies) < len(calls):
            job = self._define(blocks, prepared, calls[len(replies) :], spent)
            result = job.finish()
            job.parse()
            first, *more = job.frames or [b""]
            if first != b"=":
                return prepared.zeros(_undefined(first, result))
            if any(reply[:1] == b"?" for reply in more):
                return None
            replies += more[: len(calls) - len(replies)]
            if len(replies) == len(calls):
                break
            note = note or _note(result) or "the solution ended its process"
            timeouts += result.timed_out
            replies.append(b"x" + note.encode())
            if not result.timed_out or timeouts == _MAX_TIMEOUTS:
                break
        frames = self._judge.ask("judge", prepared.suite, str(len(replies)), *replies)
        return _verdict(prepared, frames, note)

    def judge_live(self, blocks: list[str], prepared: _Prepared) -> Verdict:
        """The verdict by calls that are made one by one."""
        spent, note, timeouts = Spent(), "", 0
        opening: list[bytes] = []
        solution = self._define(blocks, prepared, (), spent)
        first = solution.next_frame()
        if first != b"=":
            solution.kill()
            return prepared.zeros(_undefined(first or b"", solution.exit))

        def reply(request: bytes) -> bytes:
            nonlocal solution, note, timeouts
            if solution.exit is not None and 0 < timeouts < _MAX_TIMEOUTS:  # go on with the next test
                solution = self._define(blocks, prepared, (), spent)
                for message in opening:
                    solution.send(message)
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
                note = note or _note(solution.exit) or "the solution ended its process"
                timeouts = timeouts + 1 if solution.exit.timed_out else _MAX_TIMEOUTS
            return b"x" + note.encode() if found is None else found

        try:
            frames = self._judge.ask("step by step", prepared.suite, "0", reply=reply)
            return _verdict(prepared, frames, note)
        finally:
            solution.kill()

    def _define(self, blocks: list[str], prepared: _Prepared, calls: Sequence[bytes], spent: Spent) -> Job:
        code = json.dumps([blocks, prepared.wanted])
        messages: list[bytes | str] = [prepared.preamble, code, prepared.entry_point, str(len(calls)), *calls]
        return self._solutions.start("solution", *messages, spent=spent)

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
            passed.append(not _note(result) and _same_output(printed, expected, tests))
            if not passed[-1]:
                note = note or _note(result) or f"test {len(passed)}: another output than expected"
        return Verdict(tuple(passed), note)


class _Judge:
    """A judge process for many judgements of tests whose calls are known in advance."""

    def __init__(self, jail: Jail):
        self._jail = jail
        self._job: Job | None = None
        self._uses = 0

    def ask(self, *messages: bytes | str, reply: Callable[[bytes], bytes] | None = None) -> list[bytes]:
        """The messages of the judge's answer; the last is b"." unless the process exited before."""
        if self._uses >= _MAX_JUDGEMENTS or reply is not None:  # live calls cannot be made twice
            self._end()
        is_new = self._job is None
        frames = self._answer(messages, reply)
        if reply is not None:
            self._end()
            return frames
        if frames[-1:] == [b"."]:
            return frames
        if messages[0] == "judge":
            return self._answer(("step by step", *messages[1:]), None)
        return frames if is_new else self._answer(messages, None)

    def close(self) -> None:
        self._job = None
        self._jail.close()

    def _answer(self, messages: Sequence[bytes | str], reply: Callable[[bytes], bytes] | None) -> list[bytes]:
        if self._job is None:
            self._job, self._uses = self._jail.start("judge"), 0
        self._uses += 1
        self._job.begin(Spent())
        self._job.send(*messages)
        frames: list[bytes] = []
        while frames[-1:] != [b"."]:
            message = self._job.next_frame()
            if message is None:
                self._end()
                break
            if message[:1] == b"c" and reply is not None:
                self._job.send(reply(message[1:]))
                self._job.begin()
            else:
                frames.append(message)
        return frames

    def _end(self) -> None:
        job, self._job, self._uses = self._job, None, 0
        if job is not None:
            job.kill()


def _verdict(prepared: _Prepared, frames: Sequence[bytes], note: str) -> Verdict:
    said = [message for message in frames if message[:1] in (b"0", b"1")]
    passed = [message == b"1" for message in said]
    reasons = [message[1:].decode(errors="replace") for message in said if message[:1] == b"0"]
    if len(passed) < prepared.tests:
        reasons.append("the tests did not end within the limits on what the solution returned")
    passed += [False] * (prepared.tests - len(passed))
    return Verdict(tuple(passed), "" if all(passed) else note or reasons[0])


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
    return (
        f"the solution cannot be defined: {said or (_note(result) if result else '') or 'its process ended'}"
    )


def _note(result: Exit) -> str:
    if result.reason:
        return result.reason
    if result.status < 0:
        return f"signal {-result.status} after {result.cpu_seconds:.1f} s of processor time"
    return f"exit code {result.status}" if result.status else ""
