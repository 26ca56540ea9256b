"""The solution as the tests see it: proxies of its names and objects, which live in its process.

Data crosses by value, see `codec`. Proxies stand for the functions and classes that the tests name,
for instances of these classes, and for functions and iterators that the solution returns. Every use
of a proxy is a request to the solution's process. A proxy never equals data, so that no object of
the solution can pass for the value that a test expects.
"""

import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from . import pytest
from .codec import Encoder, decode_parts
from .solution import BINARY, COMPARISONS, OPERATIONS


class Failure(BaseException):
    """The test has failed, whatever it does next."""


class Link:
    """The connection of one run of the tests to the solution, and what happened on it."""

    def __init__(self, exchange: Callable[[bytes], bytes], classes: dict[str, type]):
        self._exchange = exchange
        self._classes = classes
        self._mirrors: dict[str, type] = {}
        self._given: list[Any] = []
        self._remotes: dict[int, Remote] = {}
        self.replies = 0
        """Values and exceptions that the solution has returned."""
        self.failure = ""
        """Why the present test has failed though its code may go on."""
        self.raised: list[BaseException] = []
        """Exceptions of the solution that no handler of the tests has caught."""
        self.expected = 0
        """Exceptions of the solution that a handler of the tests has caught."""

    def ask(self, operation: str, *parts: Any) -> Any:
        """The result of an operation in the solution's process; raises what it raises there."""
        encoder = Encoder(self._export)
        try:
            reply = self._exchange(encoder.encode([operation, *parts]))
            while reply[:1] == b"c":
                reply = self._exchange(self._call_back(reply[1:]))
        except Exception as error:
            self.fail(f"an argument or a call back cannot travel: {error}")
        return self.result(reply, encoder.mutable, quiet=_ENDS.get(operation))

    def result(self, reply: bytes, mutable: Sequence[Any] | None = None, *, quiet: str | None = None) -> Any:
        """The result in a reply; `mutable` are the arguments' parts to update, if it has their
        states."""
        kind, data = reply[:1], reply[1:]
        if kind not in (b"=", b"!"):
            self.fail(data.decode("utf-8", "replace") or "the solution exited before this call")
        try:
            into = mutable if kind == b"=" else None
            (found, *others), _ = decode_parts(data, self._class, self._handle, into)
            error = self._error(found, *others[:2]) if kind == b"!" else None
            sys.stdout.write("".join(others[-1:]))
        except Exception as unreadable:
            self.fail(f"the result is not plain data: {unreadable}")
        self.replies += 1
        if error is None:
            return found
        if type(error).__name__ != quiet:
            self.raised.append(error)
        raise error

    def fail(self, reason: str) -> NoReturn:
        """Fail the present test, even if it catches the exception."""
        self.failure = self.failure or reason
        raise Failure(reason)

    def expect(self, error: BaseException | None) -> None:
        """A handler of the tests has caught this exception."""
        while error is not None:
            if any(error is other for other in self.raised):
                self.raised = [other for other in self.raised if other is not error]
                self.expected += 1
            error = error.__cause__ or error.__context__

    def _call_back(self, data: bytes) -> bytes:
        (number, args, kwargs), mutable = decode_parts(data, self._class, self._handle)
        try:
            result = self._given[number](*args, **kwargs)
        except Exception as error:
            known = [kind.__name__ for kind in type(error).__mro__ if hasattr(builtins, kind.__name__)]
            return b"!" + Encoder(self._export).encode([known, list(map(str, error.args))])
        return b"=" + Encoder(self._export).encode([result, mutable])

    def _export(self, value: Any) -> Sequence[Any] | None:
        if isinstance(value, Remote):
            return "own", value._number
        if isinstance(value, Iterator):
            self._given.append(lambda: [item] if (item := next(value, _END)) is not _END else [])
            return "iterator", len(self._given) - 1
        if isinstance(value, type):
            if value.__name__ in self._mirrors:
                return "own", value._number  # type: ignore[attr-defined]
            return None
        if callable(value):
            self._given.append(value)
            return "callback", len(self._given) - 1
        kind = type(value)
        if has_methods(kind) and kind not in self._classes.values():
            self._given.append(lambda name: getattr(value, name))
            return "object", len(self._given) - 1
        if kind.__module__ == "tests":
            self._classes.setdefault(kind.__name__, kind)  # the tests give it away, so it may come back
        return None

    def _class(self, name: str) -> type:
        """The tests' class of this name, if solutions know it, else one without methods."""
        return self._classes.get(name) or self._classes.setdefault(name, type(name, (), {}))

    def _handle(self, kind: str, number: int, bases: Sequence[str]) -> Any:
        if kind == "exception":
            mirror = self._mirror(bases)
            mirror._number = number
            return mirror
        if number not in self._remotes:
            methods = {f"__{name}__": _METHODS[name] for name in bases}
            self._remotes[number] = type("Remote", (Remote,), methods)(self, number)
        return self._remotes[number]

    def _error(
        self, bases: Sequence[str], args: Sequence[Any], attributes: Mapping[str, Any]
    ) -> BaseException:
        kind = self._mirror(bases)
        error: BaseException = kind.__new__(kind, *args)
        error.args = tuple(args)
        if type(error).__dictoffset__:
            error.__dict__.update(attributes)
        return error

    def _mirror(self, bases: Sequence[str]) -> Any:
        """The exception class with these bases: a builtin one, or one that stands for the
        solution's."""
        found: type = Exception
        for name in reversed(bases):
            builtin = getattr(builtins, name, None)
            if isinstance(builtin, type):
                found = builtin if issubclass(builtin, BaseException) else found
            else:
                found = self._mirrors.setdefault(name, type(name, (found,), {}))
        return found


def has_methods(kind: type) -> bool:
    """Whether a class of the tests has methods besides Python's own."""
    own = vars(kind).items() if kind.__module__ == "tests" else ()
    return any(callable(item) and not name.startswith("__") for name, item in own)


_END = object()
_ENDS = {"next": "StopIteration", "getitem": "IndexError", "getattr": "AttributeError"}
"""How Python's own protocols say that there is no more."""


class Remote:
    """A function, class, object or iterator of the solution. A subclass has its special methods.

    An object that takes the place of data could pass for any value: `abs(f(2) - 1.41) < 0.01` and
    `3 in f(2)` ask it for the verdict. So only instances that the tests create, of a class with a
    capital letter, are `_created`, and compute with data.
    """

    def __init__(self, link: Link, number: int, created: bool = False):
        vars(self).update(_link=link, _number=number, _creates=False, _created=created)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        result = self._link.ask("call", self, list(args), kwargs)
        return _as_created(result) if self._creates else result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array"):  # NumPy would read memory where the solution says
            raise AttributeError(name)
        if name in _PREDICATES and not self._created:
            self._link.fail(_NO_DATA)
        return named(self._link.ask("getattr", self, name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("setattr", self, name, value)

    def __instancecheck__(self, other: Any) -> bool:
        return isinstance(other, Remote) and self._link.ask("isinstance", other, self) is True

    def __subclasscheck__(self, other: Any) -> bool:
        return isinstance(other, Remote) and self._link.ask("issubclass", other, self) is True


_PREDICATES = {"endswith", "isdisjoint", "issubset", "issuperset", "startswith"}
_NO_DATA = "the tests use what is not data as data: an object of the solution's own class"


def named(value: Any, name: str) -> Any:
    """The value that the tests know by this name: if it is a class, they create its instances."""
    if isinstance(value, Remote) and name.isidentifier() and name[0].isupper():
        vars(value)["_creates"] = True
    return value


def _as_created(value: Any) -> Any:
    return type(value)(value._link, value._number, True) if isinstance(value, Remote) else value


def _operation(name: str) -> Callable[..., Any]:
    takes_data = name == "contains" or name in BINARY

    def method(self: Remote, *args: Any) -> Any:
        if takes_data and not isinstance(args[0], Remote):
            if args[0] is None and name in ("eq", "ne"):
                return name == "ne"
            if name in COMPARISONS or not self._created:
                self._link.fail(_NO_DATA)
        if name == "exit":
            return self._link.ask(name, self, None, None, None)
        result = self._link.ask(name, self, *args)
        return _as_created(result) if self._created and name in BINARY else result

    return method


_METHODS = {name: _operation(name) for name in OPERATIONS}


def watch_handlers(link: Link) -> Callable[[], None]:
    """Let `suppress`, `assertRaises` and `pytest.raises` report to the link what they catch; return
    what an `except` clause has to call."""
    kinds: list[Any] = [contextlib.suppress, pytest.raises]
    if "unittest.case" in sys.modules:
        kinds.append(sys.modules["unittest.case"]._AssertRaisesContext)
    for kind in kinds:
        kind.__own_exit__ = getattr(kind, "__own_exit__", kind.__exit__)

        def leave(self: Any, *raised: Any, _own: Any = kind.__own_exit__) -> Any:
            if caught := _own(self, *raised):
                link.expect(raised[1])
            return caught

        kind.__exit__ = leave
    return lambda: link.expect(sys.exc_info()[1])
