"""Run a solution: answer the tests' requests, or run it as a program. It never sees a test."""

import ast
import atexit
import builtins
import contextlib
import io
import json
import marshal
import operator
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from .codec import DATA, CodecError, Encoder, decode, decode_parts
from .framing import Reader, write_frames

_BINARY = "add and eq floordiv ge gt le lshift lt matmul mod mul ne or pow rshift sub truediv xor"
_UNARY = "abs contains delitem getitem index invert neg pos setitem"
_BUILTINS = "bool float hash int iter len next repr reversed round str"
_READS_INPUT = re.compile(r"\binput\(|\bstdin\b|\bopen\(0")
_NAMED: dict[str, Callable[..., Any]] = {"and": operator.and_, "or": operator.or_}

INPUT = "/tmp/stdin"
"""What /dev/stdin in a jail is: there is no /proc, which it would lead to."""

COMPARISONS = {"eq", "ge", "gt", "le", "lt", "ne"}
_REFLECTED = {f"r{name}": name for name in _BINARY.split() if name not in COMPARISONS}
BINARY = (*_BINARY.split(), *_REFLECTED)
OPERATIONS = (*BINARY, *_UNARY.split(), *_BUILTINS.split(), "enter", "exit")
"""Python's special methods that tests may use on the solution's objects, without underscores."""


_SOLUTION = object()  # stands for the solution's module, which travels only where the tests import it


class _Session:
    """A defined solution, and the objects of it that the tests hold.

    "in advance": the tests do not run yet, so that results have to be data.
    """

    def __init__(
        self, names: dict[str, Any], shared: set[str], candidate: Any, mode: str, jobs: Reader, answer: int
    ):
        self._names, self._shared, self._candidate = names, shared, candidate
        self._in_advance = mode == "in advance"
        self._jobs, self._answer = jobs, answer
        self._class = _find_class(names, shared)
        self._output = sys.stdout = io.StringIO()
        self._handles: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._exposed: set[type] = set()

    def serve(self) -> None:
        """Answer requests until the pipe ends."""
        while True:
            try:
                request = self._jobs.frame()
            except EOFError:
                return
            write_frames(self._answer, self._reply(request))

    def _reply(self, request: bytes) -> bytes:
        """b"=" and the result, all arguments afterwards and what was printed, b"!" and the
        exception, or b"?" and the reason why the result cannot travel. Calls in advance have only
        their result."""
        (operation, *parts), mutable = decode_parts(request, self._class, self._handle)
        try:
            result = self._perform(operation, *parts)
        except BaseException as error:
            return b"!" + _exception(error, self._printed())
        try:
            others = [] if self._in_advance else [mutable, self._printed()]
            return b"=" + Encoder(self._export).encode([result, *others])
        except CodecError as error:
            return b"?" + str(error).encode("utf-8", "replace")[:300]

    def _printed(self) -> str:
        """What the solution has printed since the last answer."""
        text = self._output.getvalue()
        self._output.seek(0)
        self._output.truncate()
        return text

    def _perform(self, operation: str, *parts: Any) -> Any:
        if operation == "entry":
            return self._candidate(*parts[0], **parts[1])
        if operation == "name":
            return eval(parts[0], self._names) if parts[0] else _SOLUTION  # noqa: S307
        parts = tuple(sys.modules["solution"] if part is _SOLUTION else part for part in parts)
        if operation == "call":
            target, args, kwargs = parts
            return target(*args, **kwargs)
        if operation in _REFLECTED:
            operation, parts = _REFLECTED[operation], parts[::-1]
        if operation in ("getattr", "setattr", "isinstance", "issubclass"):
            return getattr(builtins, operation)(*parts)
        if operation in ("enter", "exit"):
            return getattr(type(parts[0]), f"__{operation}__")(*parts)
        special: Any = _NAMED.get(operation) or getattr(operator, operation, None)
        return (special or getattr(builtins, operation))(*parts)

    def _handle(self, kind: str, number: int) -> Any:
        if kind == "callback":
            return lambda *args, **kwargs: self._call_back(number, args, kwargs)
        if kind == "object":
            return _Theirs(lambda name: self._call_back(number, (name,), {}))
        return self._pulled(number) if kind == "iterator" else self._handles[number]

    def _pulled(self, number: int) -> Iterator[Any]:
        while item := self._call_back(number, (), {}):
            yield item[0]

    def _call_back(self, number: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        encoder = Encoder(self._export)
        data = encoder.encode([number, list(args), dict(kwargs)])
        write_frames(self._answer, b"c" + data)
        reply = self._jobs.frame()
        if reply[:1] == b"!":
            (name, *_), args = decode(reply[1:], self._class, self._handle)
            kind = getattr(builtins, name, None)
            raise (kind if isinstance(kind, type) and issubclass(kind, BaseException) else Exception)(*args)
        return decode_parts(reply[1:], self._class, self._handle, encoder.mutable)[0][0]

    def _export(self, value: Any) -> Sequence[Any] | None:
        """The handle of a part that is not data: kind, number, and the special methods of its
        class, or the bases of an exception."""
        if value is _SOLUTION:
            kind = "object"
        elif isinstance(value, type):
            if value.__module__ == "builtins":
                return None
            self._exposed.add(value)
            kind = "exception" if issubclass(value, BaseException) else "class"
        elif isinstance(value, Iterator):
            kind = "iterator"
        elif not self._exposed.isdisjoint(type(value).__mro__) or not _is_data(value, self._shared):
            kind = "object"
        else:
            return None
        if self._in_advance:
            raise CodecError("a function, class or object is not plain data")
        number = self._numbers.setdefault(id(value), len(self._handles))
        if number == len(self._handles):
            self._handles.append(value)
        if kind == "exception":
            return kind, number, [base.__name__ for base in value.__mro__]
        return kind, number, [name for name in OPERATIONS if hasattr(type(value), f"__{name}__")]


class _Theirs:
    """An object of the tests, whose methods run in their process."""

    def __init__(self, get: Callable[[str], Any]):
        self._get = get

    def __getattr__(self, name: str) -> Any:
        return self._get(name)


def _find_class(names: Mapping[str, Any], shared: set[str]) -> Callable[[str], Any]:
    """The solution's class of a name that the tests share, or else one without methods."""

    def find(name: str) -> Any:
        shared.add(name)
        return found if isinstance(found := names.get(name), type) else type(name, (), {})

    return find


def _is_data(value: Any, shared: set[str]) -> bool:
    """Whether a value crosses by value: data, or an instance of a class that the tests know too."""
    kind = type(value)
    if callable(value):
        return kind is type and value.__module__ == "builtins"
    data = (int, float, str) if isinstance(value, Enum) else DATA
    return isinstance(value, data) or kind.__name__ in shared or kind.__module__.startswith("numpy")


def answer_calls(jobs: Reader, answer: int, drop_privileges: Callable[[], None]) -> int:
    """Define the solution, then answer requests until the pipe ends.

    The job: preamble (compiled), blocks of code and the names that the tests use (JSON), entry
    point, "in advance" or "live", and requests `[operation, ...]`, of which
    `["entry", args, kwargs]` is a call that is known in advance. The first answer is b"=", or b"!"
    and the reason why the solution cannot be defined.
    """
    preamble, (blocks, wanted) = jobs.frame(), json.loads(jobs.frame())
    entry_point, mode = jobs.text(), jobs.text()
    drop_privileges()
    sys.setrecursionlimit(10_000)
    module = types.ModuleType("solution")
    module.__file__ = "/tmp/solution.py"
    sys.modules["solution"] = module
    names = module.__dict__
    try:
        exec(marshal.loads(preamble), names)  # noqa: S102, S302 - from a judge
        shared = set(names)
        with contextlib.suppress(SystemExit):  # an `exit()` ends the definitions
            _define(blocks, names, lambda block, tree: len(_defined(tree).intersection(wanted)))
        candidate = eval(entry_point, names) if entry_point else None  # noqa: S307
    except BaseException as error:
        write_frames(answer, f"!{type(error).__name__}: {error}"[:500].encode("utf-8", "replace"))
        return 0
    write_frames(answer, b"=")
    _Session(names, shared, candidate, mode, jobs, answer).serve()
    return 0


def _exception(error: BaseException, printed: str = "") -> bytes:
    """The names of the exception's bases, its arguments and its attributes, as far as they are
    data."""
    names = [kind.__name__ for kind in type(error).__mro__]
    try:
        return Encoder().encode([names, list(error.args), getattr(error, "__dict__", {}), printed])
    except CodecError:
        return Encoder().encode([names, [str(error)[:1000]], {}, printed])


def _define(blocks: Sequence[str], names: dict[str, Any], fits: Callable[[str, ast.Module], float]) -> None:
    """Run the last of the blocks that fit best; from other blocks only definitions that it lacks.

    Other blocks are drafts, parts and usage examples; what they compute is not run.
    """
    trees = [_parsed(block) for block in blocks] if len(blocks) > 1 else [None]
    fit = [-1.0 if tree is None else fits(block, tree) for block, tree in zip(blocks, trees, strict=True)]
    main = max(range(len(blocks)), key=lambda number: (fit[number], number))
    own = _defined(trees[main] or ast.Module([], []))

    def run_definitions(numbers: Sequence[int]) -> None:
        for number in numbers:
            for node in (trees[number] or ast.Module([], [])).body:
                part = ast.Module([node], [])
                if _is_definition(node) and not own & _defined(part):
                    with contextlib.suppress(Exception):  # what does not work here is not needed either
                        exec(compile(part, "<block>", "exec"), names)  # noqa: S102

    run_definitions(range(main))
    try:
        exec(compile(blocks[main], "<solution>", "exec"), names)  # noqa: S102
    finally:
        run_definitions(range(main + 1, len(blocks)))


def _parsed(block: str) -> ast.Module | None:
    try:
        return ast.parse(block)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(tree: ast.Module) -> set[str]:
    """The names that a module binds outside functions and classes."""
    found: set[str] = set()
    waiting: list[ast.AST] = [*tree.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def _is_definition(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return not any(isinstance(inner, ast.Call) for inner in ast.walk(node))
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom))


def run_program(jobs: Reader, answer: int, drop_privileges: Callable[[], None]) -> int:
    """Run the code as `__main__` with text on standard input; its output is the answer."""
    blocks, text = json.loads(jobs.frame()), jobs.frame()
    given = os.memfd_create("stdin")
    with open(given, "wb", closefd=False) as file:
        file.write(text)
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    os.dup2(answer, 1)
    os.closerange(3, given + 1)
    drop_privileges()
    if "/dev/stdin" in str(blocks) and os.path.realpath("/dev/stdin") == INPUT:
        with open(INPUT, "wb") as file:
            file.write(text)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = output = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.setrecursionlimit(10_000)
    sys.argv = ["main.py"]
    module = types.ModuleType("__main__")
    module.__file__ = "/tmp/main.py"
    sys.modules["__main__"] = module
    status = 0
    try:
        _define(blocks, module.__dict__, lambda block, tree: bool(_READS_INPUT.search(block)))
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, output):
        stream.flush()
    return status & 0xFF
