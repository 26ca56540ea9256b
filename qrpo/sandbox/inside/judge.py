"""The judge: runs a problem's tests in a cell where no solution ever runs, and asks for the solution's results.

`check(candidate)` is cut into its statements. Every statement that asserts something is one test; the others prepare it.
The candidate that the tests call is a stand-in: the real one is called in the solution's own cell, and what it returned
comes back as inert data. Where the calls' arguments depend on nothing but the tests' own text (the usual
`assert candidate(...) == ...`), all calls are known beforehand: the solution answers them in one go, and the tests are judged
afterwards. Otherwise they are made one by one, while the tests run.
"""

import ast
import builtins
import json
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from .codec import decode, encode
from .framing import Reader, write_frame

__all__ = ["Suite", "serve"]

_REPLAY, _CAPTURE, _CANDIDATE = "__replayed_call__", "__captured_call__", "__candidate__"
_NESTED = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # fmt: skip


def serve(jobs: Reader, answer: int, seal: Callable[[], None]) -> int:
    """Prepare a problem's tests, or judge a solution's replies to their calls.

    The job: "prepare" or "judge", preamble, test, entry point; to judge, also the number of replies, and the replies.
    Prepared, the answer is JSON (`tests`, their number; `calls`, theirs, or -1 where they are made one by one; `error`)
    and the calls. Judged, it is b"1" or b"0" for each test as it is judged, and between them b"c" with a call that is to
    be made, whose reply comes on the job's pipe.
    """
    action, preamble, test, entry_point = jobs.text(), jobs.text(), jobs.text(), jobs.text()
    replies = [jobs.frame() for _ in range(int(jobs.text()))] if action == "judge" else []
    seal()
    sys.setrecursionlimit(10_000)
    if action == "prepare":
        for payload in _prepared(preamble, test, entry_point):
            write_frame(answer, payload)
        return 0

    def ask(data: bytes) -> bytes:
        write_frame(answer, b"c" + data)
        return jobs.frame()

    for passed in Suite(preamble, test, entry_point).verdicts(replies, ask):
        write_frame(answer, b"1" if passed else b"0")
    return 0


def _prepared(preamble: str, test: str, entry_point: str) -> list[bytes]:
    try:
        suite = Suite(preamble, test, entry_point)
        if not suite.tests:
            raise ValueError("it asserts nothing")
        calls = suite.captured_calls()
    except BaseException as error:
        return [json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()]
    count = len(calls) if suite.known_beforehand else -1
    return [json.dumps({"tests": suite.tests, "calls": count, "error": None}).encode(), *calls]


class Suite:
    """The tests of one problem, compiled."""

    def __init__(self, preamble: str, test: str, entry_point: str):
        module = types.ModuleType("tests")
        sys.modules["tests"] = module
        self._names = module.__dict__
        exec(compile(preamble, "<preamble>", "exec"), self._names)  # noqa: S102
        tree = ast.parse(test)
        check = next(
            (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None
        )
        if check is None:
            body, candidates = tree.body, {entry_point}
        else:
            if len(check.args.args) != 1:
                raise ValueError("check takes one argument, the candidate")
            around = [node for node in tree.body if node is not check and not _calls_check(node)]
            exec(_compiled(around), self._names)  # noqa: S102
            body, candidates = check.body, {check.args.args[0].arg}
        self._candidates = candidates
        self._calls: list[ast.Call] = []
        self.known_beforehand = self._can_be_known(body)
        if self.known_beforehand:
            body = [_Replayed(self._candidates, self._calls).visit(node) for node in body]
        try:
            self._steps = [(_asserts(node), _compiled([node])) for node in body]
        except SyntaxError:  # a `return` among the statements: the function is one test
            assert check is not None
            ask = ast.parse(f"check({_CANDIDATE})").body[0]
            check = next(
                node
                for node in ast.parse(test).body
                if isinstance(node, ast.FunctionDef) and node.name == "check"
            )
            self._calls, self.known_beforehand = [], False
            self._steps = [(False, _compiled([check])), (True, _compiled([ask]))]
        self.tests = sum(is_test for is_test, _ in self._steps)

    def captured_calls(self) -> list[bytes]:
        """The calls that are known beforehand, encoded, in order."""
        self._names[_CAPTURE] = lambda *args, **kwargs: [list(args), kwargs]
        calls = []
        for node in self._calls:
            capture = ast.Call(ast.Name(_CAPTURE, ast.Load()), node.args, node.keywords)
            expression = ast.fix_missing_locations(ast.Expression(capture))
            calls.append(encode(eval(compile(expression, "<test>", "eval"), self._names)))  # noqa: S307
        return calls

    def verdicts(self, replies: list[bytes], ask: Callable[[bytes], bytes]) -> Iterator[bool]:
        """Whether each test passes, one after another."""

        def replayed(place: int) -> Any:
            if place >= len(replies):
                raise RuntimeError("the solution ended before this call")
            return self._result(replies[place])

        def candidate(*args: Any, **kwargs: Any) -> Any:
            result, args_after, kwargs_after = self._result(ask(encode([list(args), kwargs])))
            for ours, theirs in zip(args, args_after, strict=True):
                _copy_back(ours, theirs)
            for name, ours in kwargs.items():
                _copy_back(ours, kwargs_after[name])
            return result

        self._names |= {_REPLAY: replayed, _CANDIDATE: candidate} | dict.fromkeys(self._candidates, candidate)
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
            return decode(reply[1:], self._own_classes())
        name, message = decode(reply[1:], {})
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        raise kind(message)

    def _own_classes(self) -> dict[str, Any]:
        """Classes that the preamble or the tests define: the only ones that data may fill."""
        return {
            name: value
            for name, value in self._names.items()
            if isinstance(value, type) and value.__module__ == "tests"
        }

    def _can_be_known(self, body: list[ast.stmt]) -> bool:
        """Whether each use of the candidate is a plain call in an assertion, with arguments of the text's own."""
        bound = {
            node.id for step in body for node in ast.walk(step) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }  # fmt: skip
        for step in body:
            uses = [
                node for node in ast.walk(step) if isinstance(node, ast.Name) and node.id in self._candidates
            ]
            if not uses:
                continue
            if not isinstance(step, ast.Assert):
                return False
            calls = [node for node in _outside_scopes(step) if _is_call_of(node, self._candidates)]
            if len(calls) != len(uses):
                return False
            for call in calls:
                arguments = [*call.args, *call.keywords]
                inside = {n.id for a in arguments for n in ast.walk(a) if isinstance(n, ast.Name)}
                if inside & (bound | self._candidates):
                    return False
        return True


class _Replayed(ast.NodeTransformer):
    """Puts the replay of call number i in the place of the call, and keeps the calls."""

    def __init__(self, candidates: set[str], calls: list[ast.Call]):
        self._candidates = candidates
        self._calls = calls

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not _is_call_of(node, self._candidates):
            return self.generic_visit(node)
        self._calls.append(node)
        place = ast.Constant(len(self._calls) - 1)
        return ast.copy_location(ast.Call(ast.Name(_REPLAY, ast.Load()), [place], []), node)


def _is_call_of(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _calls_check(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and _is_call_of(node.value, {"check"})


def _asserts(node: ast.stmt) -> bool:
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


def _outside_scopes(node: ast.AST) -> Iterator[Any]:
    """The nodes that are evaluated once, when the statement is: none in a function or a comprehension."""
    yield node
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, _NESTED):
            yield from _outside_scopes(inner)


def _compiled(body: list[ast.stmt]) -> types.CodeType:
    return compile(ast.fix_missing_locations(ast.Module(body, [])), "<test>", "exec")


def _copy_back(ours: Any, theirs: Any) -> None:
    """Make of an argument what the solution made of its copy."""
    if isinstance(ours, list):
        ours[:] = theirs
    elif isinstance(ours, (dict, set)):
        ours.clear()
        ours.update(theirs)
    elif hasattr(ours, "__dict__") and type(ours) is type(theirs):
        ours.__dict__ = theirs.__dict__
