"""The part of pytest that tests of solutions use: `raises`, `approx`, `mark.parametrize`, fixtures.

Imported by tests as `pytest`, which is not in the jail. What is missing here is refused.
"""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class raises:
    """A context that passes if its block raises the expected exception."""

    def __init__(self, expected: Any, *call: Any, match: str | None = None, **kwargs: Any):
        self._expected, self._match = expected, match
        self.type = self.value = None
        if call:
            with self:
                call[0](*call[1:], **kwargs)

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
        self.type, self.value = kind, error
        return self._match is None or self.match(self._match)


class approx:
    """A number, or a container of numbers, up to a tolerance."""

    __array_ufunc__ = None

    def __init__(self, expected: Any, rel: float | None = None, abs: Any = None, nan_ok: bool = False):  # noqa: A002
        self._expected, self._nan = expected, nan_ok
        self._absolute = 1e-12 if abs is None else abs
        self._relative = 1e-6 if rel is None and abs is None else rel or 0.0

    def __eq__(self, other: Any) -> bool:
        return self._close(other, self._expected)

    __hash__ = None  # type: ignore[assignment]

    def _close(self, actual: Any, expected: Any) -> bool:
        if isinstance(expected, Mapping):
            known = isinstance(actual, Mapping) and actual.keys() == expected.keys()
            return known and all(self._close(actual[key], value) for key, value in expected.items())
        if hasattr(expected, "__len__") and not isinstance(expected, (str, bytes)):
            alike = hasattr(actual, "__len__") and len(actual) == len(expected)
            return alike and all(map(self._close, actual, expected))
        exact = isinstance(expected, (str, bytes, bool, type(None))) or isinstance(
            actual, (str, bytes, type(None))
        )
        if exact or actual == expected:
            return bool(actual == expected)
        if expected != expected:
            return self._nan and actual != actual
        if isinstance(expected, (int, float)) and math.isinf(expected):
            return False
        return bool(abs(actual - expected) <= max(self._relative * abs(expected), self._absolute))


class _Mark:
    def __getattr__(self, name: str) -> Any:
        if name in ("skip", "skipif", "xfail", "usefixtures"):
            raise NotImplementedError(f"pytest.mark.{name} is not supported")
        return lambda *args, **kwargs: args[0] if len(args) == 1 and callable(args[0]) else lambda test: test

    def parametrize(self, names: str | Sequence[str], values: Any, **_: Any) -> Callable[[Any], Any]:
        listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        given = [v.values if isinstance(v, param) else (v,) if len(listed) == 1 else v for v in values]
        rows = [dict(zip(listed, row, strict=True)) for row in given]

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
    parameters = inspect.signature(test).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
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
