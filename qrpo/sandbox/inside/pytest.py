"""The part of pytest that tests of solutions use: `raises`, `approx`, `mark.parametrize`, fixtures.

Imported by tests as `pytest`, which is not in the jail. What is missing here is refused.
"""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["approx", "cases", "fail", "fixture", "mark", "param", "raises", "run"]


class raises:
    """A context that passes if its block raises the expected exception."""

    def __init__(self, expected: Any, *call: Any, match: str | None = None, **kwargs: Any):
        self._expected, self._match = expected, match
        self.value: Any = None
        if call:
            with self:
                call[0](*call[1:], **kwargs)

    @property
    def type(self) -> Any:
        """The class of the exception."""
        return type(self.value)

    def match(self, pattern: str) -> bool:
        """Whether the pattern occurs in the message, as an assertion."""
        assert re.search(pattern, str(self.value)), f"{str(self.value)!r} does not match {pattern!r}"
        return True

    def __enter__(self) -> "raises":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert kind is not None, f"did not raise {self._expected}"
        if not issubclass(kind, self._expected):
            return False
        self.value = error
        return self._match is None or self.match(self._match)


class approx:
    """A number, or a container of numbers, up to a tolerance."""

    __array_ufunc__ = None

    def __init__(
        self,
        expected: Any,
        rel: float | None = None,
        abs: float | None = None,  # noqa: A002
        nan_ok: bool = False,
    ):
        self._expected, self._rel, self._abs, self._nan = expected, rel, abs, nan_ok

    def __eq__(self, other: Any) -> bool:
        return self._close(other, self._expected)

    __hash__ = None  # type: ignore[assignment]

    def _close(self, actual: Any, expected: Any) -> bool:
        if isinstance(expected, Mapping):
            return (
                isinstance(actual, Mapping)
                and actual.keys() == expected.keys()
                and all(self._close(actual[key], value) for key, value in expected.items())
            )
        if hasattr(expected, "__len__") and not isinstance(expected, (str, bytes)):
            return (
                hasattr(actual, "__len__")
                and len(actual) == len(expected)
                and all(map(self._close, actual, expected))
            )
        if isinstance(expected, (str, bytes, bool, type(None))) or isinstance(
            actual, (str, bytes, type(None))
        ):
            return bool(actual == expected)
        if expected != expected:
            return self._nan and actual != actual
        if actual == expected:
            return True
        if isinstance(expected, (int, float)) and math.isinf(expected):
            return False
        absolute = 1e-12 if self._abs is None else self._abs
        relative = 1e-6 if self._rel is None and self._abs is None else self._rel or 0.0
        return bool(abs(actual - expected) <= max(relative * abs(expected), absolute))


class _Mark:
    def __getattr__(self, name: str) -> Any:
        if name in ("skip", "skipif", "xfail", "usefixtures"):
            raise NotImplementedError(f"pytest.mark.{name} is not supported")
        return lambda *args, **kwargs: args[0] if len(args) == 1 and callable(args[0]) else lambda test: test

    def parametrize(self, names: str | Sequence[str], values: Any, **_: Any) -> Callable[[Any], Any]:
        listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        rows = []
        for value in values:
            row = value.values if isinstance(value, param) else (value,) if len(listed) == 1 else tuple(value)
            rows.append(dict(zip(listed, row, strict=True)))

        def apply(test: Any) -> Any:
            test.__cases__ = [rows, *getattr(test, "__cases__", [])]
            return test

        return apply


class param:
    """One case of `mark.parametrize`."""

    def __init__(self, *values: Any, id: str | None = None):  # noqa: A002
        self.values = values


mark = _Mark()


def fixture(function: Any = None, **options: Any) -> Any:
    """Make a function the source of the argument of its name."""
    if function is None:
        return lambda made: fixture(made, **options)
    function.__fixture__ = True
    return function


def fail(reason: str = "", **_: Any) -> None:
    """Fail the test."""
    raise AssertionError(reason)


def cases(test: Any) -> list[dict[str, Any]]:
    """The arguments of each case of a test: one without arguments if it has no parameters."""
    products = itertools.product(*getattr(test, "__cases__", []))
    return [{name: value for row in rows for name, value in row.items()} for rows in products]


def missing(test: Any, given: Mapping[str, Any], names: Mapping[str, Any], owner: Any = None) -> list[str]:
    """The arguments of a test that nothing provides."""
    wanted = [
        parameter.name
        for parameter in inspect.signature(test).parameters.values()
        if parameter.default is parameter.empty and parameter.name != "self"
    ]
    return [name for name in wanted if name not in given and not _fixture(name, names, owner)]


def run(test: Any, given: Mapping[str, Any], names: Mapping[str, Any], owner: Any = None) -> None:
    """Run a test with its case's arguments and its fixtures."""
    open_fixtures: list[Iterator[Any]] = []
    made: dict[str, Any] = {}

    def call(function: Any, extra: Mapping[str, Any]) -> Any:
        arguments = {}
        for name in inspect.signature(function).parameters:
            if name in extra:
                arguments[name] = extra[name]
            elif (source := _fixture(name, names, owner)) is not None:
                if name not in made:
                    found = call(source, {})
                    if inspect.isgenerator(found):
                        open_fixtures.append(found)
                        found = next(found)
                    made[name] = found
                arguments[name] = made[name]
        return function(**arguments)

    call(test, given)
    for opened in reversed(open_fixtures):
        next(opened, None)


def _fixture(name: str, names: Mapping[str, Any], owner: Any) -> Any:
    found = getattr(owner, name, None) or names.get(name)
    return found if getattr(found, "__fixture__", False) is True else None
