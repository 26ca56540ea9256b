"""Judge solutions with their tests, in as many jails in parallel as there are cores."""

import itertools
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from qrpo.errors import DataError, EngineError
from qrpo.sandbox.inside.framing import complete_frames
from qrpo.sandbox.isolator import find_bubblewrap, find_packages
from qrpo.sandbox.jail import Exit, Jail, Job
from qrpo.sandbox.limits import Limits

__all__ = ["CheckTests", "ProgramTests", "Sandbox", "Verdict"]

logger = logging.getLogger(__name__)

_MAX_PREPARED = 4096  # problems whose prepared tests are cached
_MAX_JUDGEMENTS = 200  # judgements per judge process
_NO_REPLY = b'!["RuntimeError",[]]'  # the proxy of a solution that has exited raises this


@dataclass(frozen=True, slots=True)
class CheckTests:
    """Assertions about a callable: `def check(candidate)`, or bare `assert`s."""

    test: str
    """Source. Each statement of `check` that asserts something is one test."""
    entry_point: str
    """An expression for the callable among the solution's names: `add`, `Solution().twoSum`."""
    preamble: str = ""
    """Source that precedes the solution, and the tests."""


@dataclass(frozen=True, slots=True)
class ProgramTests:
    """The expected output of a program for each input; spaces at line ends are ignored."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which tests a solution passed."""

    passed: tuple[bool, ...]
    note: str = ""
    """Why it did not finish, for people: "exit code 1", "wall time", "output"; else empty."""

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
    suite: bytes
    preamble: bytes
    calls: tuple[bytes, ...]
    live: bool


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

    def judge(self, solutions: Sequence[tuple[str, CheckTests | ProgramTests]]) -> list[Verdict | DataError]:
        """A verdict for each (code, tests); a DataError where the tests cannot be used."""
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

    def _judge_one(self, code: str, tests: CheckTests | ProgramTests) -> Verdict | DataError:
        with self._lock:
            worker = self._free.pop() if self._free else self._new_worker()
        try:
            return self._judge_with(worker, code, tests)
        except EngineError:  # a failure of the jail, which solutions cannot cause: try once more in new jails
            worker.close()
            return self._judge_with(worker, code, tests)
        finally:
            with self._lock:
                self._free.append(worker)

    def _new_worker(self) -> "_Worker":
        jails = [Jail(self.limits, packages=self._packages, bare=self._bare) for _ in range(2)]
        return _Worker(*jails)

    def _judge_with(
        self, worker: "_Worker", code: str, tests: CheckTests | ProgramTests
    ) -> Verdict | DataError:
        if isinstance(tests, ProgramTests):
            if not tests.inputs or len(tests.inputs) != len(tests.outputs):
                return DataError(
                    f"got {len(tests.inputs)} inputs and {len(tests.outputs)} outputs, expected the same number, not 0"
                )
            return worker.run_program(code, tests)
        with self._lock:
            prepared = self._prepared.get(tests)
        if prepared is None:
            prepared = worker.prepare(tests)
            with self._lock:
                self._prepared[tests] = prepared
                if len(self._prepared) > _MAX_PREPARED:
                    self._prepared.popitem(last=False)
        return prepared if isinstance(prepared, DataError) else worker.judge(code, tests, prepared)


class _Worker:
    """Two jails: one runs solutions, the other judges, which see the tests."""

    def __init__(self, solutions: Jail, judges: Jail):
        self._solutions = solutions
        self._judge = _Judge(judges)

    def close(self) -> None:
        self._solutions.close()
        self._judge.close()

    def prepare(self, tests: CheckTests) -> _Prepared | DataError:
        frames = self._judge.ask("prepare", tests.preamble, tests.test, tests.entry_point)
        if not frames or frames[-1] != b".":
            return DataError("the tests cannot be prepared within the limits")
        facts = json.loads(frames[0])
        if facts["error"] is not None:
            return DataError(f"the tests cannot be used: {facts['error']}")
        return _Prepared(facts["tests"], frames[1], frames[2], tuple(frames[3:-1]), live=facts["calls"] < 0)

    def judge(self, code: str, tests: CheckTests, prepared: _Prepared) -> Verdict:
        calls = prepared.calls
        count = -1 if prepared.live else len(calls)
        solution = self._solutions.start(
            "solution", prepared.preamble, code, tests.entry_point, str(count), *calls
        )
        if prepared.live:
            return self._judge_live(solution, prepared)
        note = _note(solution.finish())
        replies = complete_frames(solution.output, len(calls))
        return _verdict(prepared, self._judge.ask("judge", prepared.suite, str(len(replies)), *replies), note)

    def _judge_live(self, solution: Job, prepared: _Prepared) -> Verdict:
        numbers = itertools.count()

        def reply(call: bytes) -> bytes:
            solution.send(call)
            return solution.next_frame(next(numbers)) or _NO_REPLY

        try:
            frames = self._judge.ask("step by step", prepared.suite, "0", reply=reply)
            return _verdict(prepared, frames, _note(solution.exit) if solution.exit else "")
        finally:
            solution.kill()

    def run_program(self, code: str, tests: ProgramTests) -> Verdict:
        passed, note = [], ""
        for text, expected in zip(tests.inputs, tests.outputs, strict=True):
            job = self._solutions.start("program", code, text)
            result = job.finish()
            note = note or _note(result)
            printed = job.output.decode(errors="replace")
            passed.append(result.status == 0 and _lines(printed) == _lines(expected))
        return Verdict(tuple(passed), note)


class _Judge:
    """A judge process for many judgements. One that ends it is repeated step by step."""

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
        if frames[-1:] == [b"."] or reply is not None:
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
        self._job.output.clear()
        self._job.send(*messages)
        frames: list[bytes] = []
        while frames[-1:] != [b"."]:
            message = self._job.next_frame(len(frames))
            if message is None:
                self._end()
                break
            frames.append(message)
            if message[:1] == b"c" and reply is not None:
                self._job.send(reply(message[1:]))
        return frames

    def _end(self) -> None:
        job, self._job, self._uses = self._job, None, 0
        if job is not None:
            job.kill()


def _verdict(prepared: _Prepared, frames: Sequence[bytes], note: str) -> Verdict:
    verdicts = [message == b"1" for message in frames if message in (b"0", b"1")]
    return Verdict((*verdicts, *[False] * (prepared.tests - len(verdicts))), note)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _note(result: Exit) -> str:
    if result.reason:
        return result.reason
    if result.status < 0:
        return f"signal {-result.status} after {result.cpu_seconds:.1f} s of processor time"
    return f"exit code {result.status}" if result.status else ""
