"""The judge: runs a problem's tests in a process that never runs a solution, and obtains the
solution's results.

What the tests use of the solution are proxies: the real one runs in the solution's process, and its
results arrive as inert data. If the arguments of all calls depend only on the tests' source (as in
the usual `assert candidate(...) == ...`), the calls are known in advance: the solution answers them
in one pass, and the tests are judged afterwards. Otherwise they are made one by one while the tests
run.

A test passes if it ran to its end on values that the solution returned, and at least one of its
assertions was executed. Whatever else happens is a failure with a reason.
"""

import ast
import json
import marshal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from . import pytest
from .codec import CodecError, Encoder, encode
from .framing import Reader, write_frames
from .remote import Link, Remote, has_methods, named, watch_handlers
from .statements import ASSERTED, CALL, CALL_TEST, CAPTURE, HANDLED
from .suite import Step, read_tests


def serve(jobs: Reader, answer: int, drop_privileges: Callable[[], None]) -> int:
    """Serve requests one after another until the pipe ends. b"." ends each answer.

    - "prepare", preamble, test, entry point: answers with JSON (`tests`, their number; `weak`, the
      number of those that pass for any truthy value; `calls`, whether they are known in advance;
      `entry_point`; the `wanted` names of the solution and how many of them are `bound`; or
      `error`), the compiled suite, the compiled preamble, and the calls.
    - "judge", compiled suite, number of replies, replies to the calls that are known in advance:
      answers with b"1", or b"0" and the reason, for each test as soon as it is known. Without
      replies, b"c" is a request to the solution, whose reply is the next message.
    """
    drop_privileges()
    sys.setrecursionlimit(10_000)
    sys.modules["pytest"] = pytest

    def exchange(request: bytes) -> bytes:
        write_frames(answer, b"c" + request)
        return jobs.frame()

    while True:
        try:
            action = jobs.text()
        except EOFError:
            return 0
        if action == "prepare":
            write_frames(answer, *_prepared(jobs.text(), jobs.text(), jobs.text()))
        else:
            suite = Suite.loaded(jobs.frame())
            replies = [jobs.frame() for _ in range(int(jobs.text()))]
            for reason in suite.reasons(replies, exchange):
                write_frames(answer, b"0" + reason.encode("utf-8", "replace")[:400] if reason else b"1")
        write_frames(answer, b".")


_UNEXPECTED = "\ue000 a value that no test can expect"


def _prepared(preamble: str, test: str, entry_point: str) -> list[bytes]:
    try:
        suite = Suite.read(preamble, test, entry_point)
        calls = suite.captured_calls()
        known = [b"=" + encode([_UNEXPECTED])] * len(calls or ())
        reasons = list(Suite.loaded(suite.dumped()).reasons(known, bytes)) if known else []
    except BaseException as error:
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        return [json.dumps({"error": said}).encode()]
    nodes = [n for text in (*suite.names.values(), suite.entry) for n in ast.walk(ast.parse(text))]
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    facts = {
        "tests": sum(step.is_test for step in suite.steps),
        "weak": reasons.count(""),
        "calls": calls is not None,
        "entry_point": suite.entry,
        "wanted": sorted({node.id for node in nodes if isinstance(node, ast.Name)} - own),
        "bound": len(suite.names),
        "error": None,
    }
    return [json.dumps(facts).encode(), suite.dumped(), marshal.dumps(suite.preamble), *(calls or ())]


class Suite:
    """The tests of one problem, in a namespace of their own."""

    def __init__(
        self,
        preamble: types.CodeType,
        steps: list[Step],
        names: dict[str, str],
        entry: str,
        calls: types.CodeType | None,
    ):
        self.preamble, self.steps, self.names, self.entry, self._calls = preamble, steps, names, entry, calls
        module = types.ModuleType("tests")
        sys.modules["tests"] = module
        self._names = module.__dict__
        exec(preamble, self._names)  # noqa: S102
        self._preamble_names = frozenset(self._names)
        self._names |= dict.fromkeys((ASSERTED, HANDLED), _Anything())
        self._data: set[str] = set()
        self._asserted = 0

    @classmethod
    def read(cls, preamble: str, test: str, entry_point: str) -> "Suite":
        """From source; raises what the source raises, or ValueError if it is not understood."""
        suite = cls(compile(preamble, "<preamble>", "exec"), [], {}, "", None)
        steps, names, entry, calls = read_tests(test, entry_point, set(suite._names))
        suite._names |= dict.fromkeys(names, _Anything())
        has_functions = any(step.function for step in steps)
        cases = [case for step in steps for case in suite._cases(step, run=has_functions or not step.stores)]
        return cls(suite.preamble, cases, names, entry, calls)

    def _cases(self, step: Step, *, run: bool) -> list[Step]:
        """The step, once for each case of its test function; `run` it if it is no test."""
        if not step.function:
            try:
                if run and not step.is_test:
                    exec(step.code, self._names)  # noqa: S102
            except ImportError:
                raise
            except BaseException as error:  # it may need the solution
                self._names["__error__"] = error
            return [step]
        if step.function not in self._names:
            raise ValueError(f"{step.function!r} cannot be defined: {self._names.get('__error__')}")
        owner, _, method = step.label.partition(".")
        test = getattr(self._names[owner], method) if method else self._names[owner]
        cases = pytest.cases(test)
        if missing := pytest.missing(
            test, cases[0] if cases else {}, self._names, method and self._names[owner]
        ):
            raise ValueError(f"nothing provides the argument {missing[0]!r} of {step.label!r}")
        return [replace(step, case=case) for case in range(len(cases))]

    @classmethod
    def loaded(cls, data: bytes) -> "Suite":
        """From the result of `dumped`."""
        preamble, steps, *others = marshal.loads(data)  # noqa: S302 - written by a judge
        return cls(preamble, [Step(*step) for step in steps], *others)

    def dumped(self) -> bytes:
        """The compiled suite, for another judge."""
        steps = [tuple(vars(step).values()) for step in self.steps]
        return marshal.dumps((self.preamble, steps, self.names, self.entry, self._calls))

    def captured_calls(self) -> list[bytes] | None:
        """The calls that are known in advance, encoded, in order; None if they are not known."""
        if self._calls is None:
            return None
        variables = {name for step in self.steps for name in step.stores}  # no call depends on them
        for step in self.steps:
            if not step.is_test and variables.isdisjoint([*step.stores, *step.loads]):
                exec(step.code, self._names)  # noqa: S102
        self._names[CAPTURE] = lambda *args, **kwargs: ["entry", list(args), kwargs]
        try:
            return [Encoder(self._refuse_live).encode(call) for call in eval(self._calls, self._names)]  # noqa: S307
        except CodecError:  # a function among the arguments
            return None

    def _refuse_live(self, value: Any) -> None:
        kind = type(value)
        if has_methods(kind) and kind.__name__ not in self._preamble_names:
            raise CodecError("an object of the tests with methods is not plain data")

    def reasons(self, replies: list[bytes], exchange: Callable[[bytes], bytes]) -> Iterator[str]:
        """Why each test fails, one after another; empty for a test that passes.

        `replies` answer the calls that are known in advance; else each request is an `exchange`.
        """
        classes = {n: v for n, v in self._names.items() if isinstance(v, type) and v.__module__ == "tests"}
        link = Link(exchange, classes)

        def call(index: int, candidate: Callable[[], Any]) -> Any:
            if not replies:
                return candidate()
            missing = b"?the solution exited before this call"
            return lambda *args, **kwargs: link.result(replies[index] if index < len(replies) else missing)

        def asserted() -> None:
            self._asserted += 1

        def call_test(test: Any, method: str, case: int) -> None:
            _call_test(test, method, case, self._names)

        handled = watch_handlers(link)
        self._names |= {CALL: call, ASSERTED: asserted, HANDLED: handled, CALL_TEST: call_test}
        absent = {} if replies else self._bind(link)
        spoilt: dict[str, str] = {}
        variables = {name for step in self.steps for name in step.stores}
        for step in self.steps:
            if replies or step.function:
                link.replies = 0
            reason = self._run(step, link)
            reason = next((spoilt[name] for name in step.loads if name in spoilt), reason)
            if step.is_test:
                lacking = [absent[name] for name in step.loads if name in absent]
                yield f"{step.label}: {'; '.join([*lacking[:1], reason])}" if reason else ""
            elif reason:
                touched = {*step.stores, *variables.intersection(step.loads)}
                spoilt = dict.fromkeys(touched, f"{step.label}: {reason}") | spoilt

    def _bind(self, link: Link) -> dict[str, str]:
        """Bind the solution's names; return why those without a value have none."""
        absent = {}
        for name, expression in self.names.items():
            try:
                found = self._names[name] = named(link.ask("name", expression), expression)
                self._data |= set() if isinstance(found, Remote) else {name}
            except BaseException as error:
                self._names.pop(name, None)
                absent[name] = f"the solution's {expression or 'module'!r}: {error}"
        link.replies = 0
        return absent

    def _run(self, step: Step, link: Link) -> str:
        """Why the step fails; empty if it passes."""
        link.failure, link.raised, link.expected, self._asserted = "", [], 0, 0
        self._names["__case__"] = step.case
        try:
            for name in self._data.intersection(step.loads):  # the solution may have changed it
                self._names[name] = link.ask("name", self.names[name])
            exec(step.code, self._names)  # noqa: S102
        except BaseException as error:
            return link.failure or _described(error)
        if link.failure:
            return link.failure
        if link.raised:
            return f"the tests do not expect {type(link.raised[0]).__name__}: {link.raised[0]}"
        if not step.is_test:
            return ""
        if not link.replies:
            return "the solution returned no value to it"
        asserted = self._asserted or link.expected or not step.needs_assertion
        return "" if asserted else "no assertion was executed"


class _Anything:
    """Stands for the solution while the tests are read."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


def _call_test(test: Any, method: str, case: int, names: dict[str, Any]) -> None:
    """Run a test function, or a method of a class of unittest or pytest."""
    if not method:
        pytest.run(test, pytest.cases(test)[case], names)
        return
    unittest = sys.modules.get("unittest")
    if unittest and issubclass(test, unittest.TestCase):
        result = unittest.TestResult()
        unittest.TestSuite([test(method)]).run(result)
        for _, text in (*result.errors, *result.failures):
            raise AssertionError(text.strip().splitlines()[-1])
        if result.testsRun != 1 or result.skipped or result.expectedFailures or result.unexpectedSuccesses:
            raise AssertionError("the test was skipped")
        return
    owner = test()
    for name in ("setup_class", "setup_method"):
        if hasattr(owner, name):
            _call_setup(getattr(owner, name))
    bound = getattr(owner, method)
    pytest.run(bound, pytest.cases(bound)[case], names, owner)


def _call_setup(function: Any) -> None:
    try:
        function()
    except TypeError:  # pytest passes the method where one is wanted
        function(None)


def _described(error: BaseException) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<test>"]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}{where}: {error}".rstrip(": ")
