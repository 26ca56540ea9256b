"""The judge: runs a problem's tests in a process that never runs a solution, and obtains the
solution's results.

`check(candidate)` is split into its statements. Every statement with an assertion is one test; the
others prepare tests. The candidate that the tests call is a proxy: the real one runs in the
solution's process, and its results arrive as inert data. If the arguments of all calls depend only
on the tests' source (as in the usual `assert candidate(...) == ...`), the calls are known in
advance: the solution answers them in one pass, and the tests are judged afterwards. Otherwise they
are made one by one while the tests run.
"""

import ast
import builtins
import json
import marshal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from .codec import decode, encode
from .framing import Reader, write_frames

__all__ = ["Suite", "serve"]

_REPLAY, _CAPTURE, _CANDIDATE = "__replayed_call__", "__captured_call__", "__candidate__"
_NESTED = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # fmt: skip


def serve(jobs: Reader, answer: int, drop_privileges: Callable[[], None]) -> int:
    """Serve requests one after another until the pipe ends. b"." ends each answer.

    - "prepare", preamble, test, entry point: answers with JSON (`tests` and `calls`, their numbers,
      where calls are -1 if they are made one by one; or `error`), the compiled suite, the compiled
      preamble, and the calls.
    - "judge", compiled suite, number of replies, replies: answers with b"1" or b"0" for each test,
      all at the end.
    - "step by step" with the same: answers with each verdict as soon as it is known, and with b"c"
      and a call to make, whose reply is the next message.
    """
    drop_privileges()
    sys.setrecursionlimit(10_000)

    def ask(data: bytes) -> bytes:
        write_frames(answer, b"c" + data)
        return jobs.frame()

    while True:
        try:
            action = jobs.text()
        except EOFError:
            return 0
        if action == "prepare":
            write_frames(answer, *_prepared(jobs.text(), jobs.text(), jobs.text()), b".")
            continue
        suite = Suite.loaded(jobs.frame())
        replies = [jobs.frame() for _ in range(int(jobs.text()))]
        kept = []
        for passed in suite.verdicts(replies, ask):
            kept.append(b"1" if passed else b"0")
            if action == "step by step":
                write_frames(answer, kept.pop())
        write_frames(answer, *kept, b".")


def _prepared(preamble: str, test: str, entry_point: str) -> list[bytes]:
    try:
        suite = Suite.compiled(preamble, test, entry_point)
        if not suite.tests:
            raise ValueError("they assert nothing")
        calls = suite.captured_calls()
    except BaseException as error:
        return [json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()]
    count = len(calls) if suite.calls is not None else -1
    facts = {"tests": suite.tests, "calls": count, "error": None}
    return [json.dumps(facts).encode(), suite.dumped(), suite.preamble(), *calls]


class Suite:
    """The tests of one problem: code that defines names, and one step per statement."""

    def __init__(
        self,
        definitions: list[types.CodeType],
        steps: list[tuple[bool, types.CodeType]],
        candidates: list[str],
        calls: types.CodeType | None,
    ):
        self._parts = (definitions, steps, candidates, calls)
        self._steps = steps
        self._candidates = candidates
        self.calls = calls
        """Code for the list of the calls' arguments; None if not known in advance."""
        self.tests = sum(is_test for is_test, _ in steps)
        module = types.ModuleType("tests")
        sys.modules["tests"] = module
        self._names = module.__dict__
        for code in definitions:
            exec(code, self._names)  # noqa: S102

    @classmethod
    def compiled(cls, preamble: str, test: str, entry_point: str) -> "Suite":
        """From source; raises what the source raises, or ValueError if it is not a test."""
        tree = ast.parse(test)
        check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
        if check is None:
            around: list[ast.stmt] = []
            body, candidate = tree.body, entry_point
        else:
            if len(check.args.args) != 1:
                raise ValueError("check takes one argument, the candidate")
            around = [node for node in tree.body if node is not check and not _calls_check(node)]
            body, candidate = check.body, check.args.args[0].arg
        definitions = [compile(preamble, "<preamble>", "exec"), _compiled(around)]
        known = _known_in_advance(body, candidate)
        replayed = _Replayed(candidate)
        try:
            if known:
                steps = [(_asserts(node), _compiled([replayed.visit(node)])) for node in body]
                return cls(definitions, steps, [candidate], _captures(replayed.calls))
            return cls(definitions, [(_asserts(node), _compiled([node])) for node in body], [candidate], None)
        except SyntaxError:  # a `return` among the statements: the whole function is one test
            assert check is not None
            whole = [node for node in ast.parse(test).body if not _calls_check(node)]
            call = ast.parse(f"check({_CANDIDATE})").body
            return cls([definitions[0], _compiled(whole)], [(True, _compiled(call))], [_CANDIDATE], None)

    @classmethod
    def loaded(cls, data: bytes) -> "Suite":
        """From the result of `dumped`."""
        return cls(*marshal.loads(data))  # noqa: S302 - written by a judge

    def dumped(self) -> bytes:
        """The compiled suite, for another judge."""
        return marshal.dumps(self._parts)

    def preamble(self) -> bytes:
        """The compiled preamble, for solutions."""
        return marshal.dumps(self._parts[0][0])

    def captured_calls(self) -> list[bytes]:
        """The calls that are known in advance, encoded, in order."""
        if self.calls is None:
            return []
        self._names[_CAPTURE] = lambda *args, **kwargs: [list(args), kwargs]
        return [encode(call) for call in eval(self.calls, self._names)]  # noqa: S307

    def verdicts(self, replies: list[bytes], ask: Callable[[bytes], bytes]) -> Iterator[bool]:
        """Whether each test passes, one after another."""

        def replayed(index: int) -> Any:
            if index >= len(replies):
                raise RuntimeError("the solution exited before this call")
            return self._result(replies[index])

        def candidate(*args: Any, **kwargs: Any) -> Any:
            result, args_after, kwargs_after = self._result(ask(encode([list(args), kwargs])))
            for ours, theirs in zip(args, args_after, strict=True):
                _copy_back(ours, theirs)
            for name, ours in kwargs.items():
                _copy_back(ours, kwargs_after[name])
            return result

        self._names |= {_REPLAY: replayed} | dict.fromkeys(self._candidates, candidate)
        for is_test, step in self._steps:
            try:
                exec(step, self._names)  # noqa: S102
                passed = True
            except BaseException:
                passed = False
            if is_test:
                yield passed

    def _result(self, reply: bytes) -> Any:
        if reply[:1] == b"=":
            return decode(reply[1:], self._own_class)
        name, message = decode(reply[1:], self._own_class)
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        raise kind(message)

    def _own_class(self, name: str) -> Any:
        """The class of this name in the preamble or the tests; no other class can be created."""
        found = self._names.get(name)
        return found if isinstance(found, type) and found.__module__ == "tests" else None


def _known_in_advance(body: list[ast.stmt], candidate: str) -> bool:
    """Whether the candidate is only called in assertions, without variables of the test."""
    bound = {n.id for step in body for n in ast.walk(step) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}  # fmt: skip
    for step in body:
        uses = sum(isinstance(node, ast.Name) and node.id == candidate for node in ast.walk(step))
        calls = [node for node in _outside_scopes(step) if _is_call_of(node, candidate)]
        if uses and (not isinstance(step, ast.Assert) or len(calls) != uses):
            return False
        for call in calls:
            inside = {n.id for part in (*call.args, *call.keywords) for n in ast.walk(part) if isinstance(n, ast.Name)}  # fmt: skip
            if inside & (bound | {candidate}):
                return False
    return True


def _captures(calls: list[ast.Call]) -> types.CodeType:
    captured: list[ast.expr] = [ast.Call(ast.Name(_CAPTURE, ast.Load()), c.args, c.keywords) for c in calls]
    expression = ast.Expression(ast.List(captured, ast.Load()))
    return compile(ast.fix_missing_locations(expression), "<test>", "eval")


class _Replayed(ast.NodeTransformer):
    """Replaces call number i by its replay, and collects the calls."""

    def __init__(self, candidate: str):
        self._candidate = candidate
        self.calls: list[ast.Call] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not _is_call_of(node, self._candidate):
            return self.generic_visit(node)
        self.calls.append(node)
        index = ast.Constant(len(self.calls) - 1)
        return ast.copy_location(ast.Call(ast.Name(_REPLAY, ast.Load()), [index], []), node)


def _is_call_of(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _calls_check(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and _is_call_of(node.value, "check")


def _asserts(node: ast.stmt) -> bool:
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


def _outside_scopes(node: ast.AST) -> Iterator[Any]:
    """The nodes evaluated exactly once: none in a function or a comprehension."""
    yield node
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, _NESTED):
            yield from _outside_scopes(inner)


def _compiled(body: list[ast.stmt]) -> types.CodeType:
    return compile(ast.fix_missing_locations(ast.Module(body, [])), "<test>", "exec")


def _copy_back(ours: Any, theirs: Any) -> None:
    """Apply the solution's changes of an argument's copy to the argument."""
    if isinstance(ours, list):
        ours[:] = theirs
    elif isinstance(ours, (dict, set)):
        ours.clear()
        ours.update(theirs)
    elif hasattr(ours, "__dict__") and type(ours) is type(theirs):
        ours.__dict__ = theirs.__dict__
