"""Python values as inert data: a solution's result reaches the judge as numbers, strings and
containers, or not at all.

A value is encoded as a flat table of nodes in JSON. The table preserves linked lists of any length,
shared parts and cycles; JSON's reader is safe on hostile input. A container is referenced by its
index in the table, as `[index]`. Subclasses of builtin types become the builtin type: an `int`
whose `__eq__` is always true arrives as a plain int. NumPy's numeric arrays and scalars are
supported where NumPy is loaded. Instances of a class written in Python are encoded as the class's
name and attributes; they are created again without calling any method, if the reader knows a class
of that name. Functions, iterators, files and the like cannot be encoded.
"""

import json
import re
import sys
from collections import deque
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

__all__ = ["CodecError", "decode", "encode"]

_ATOMS = frozenset({type(None), bool, int, float, str})
_JSON_INT = 1 << 63  # larger ones are written in hexadecimal, for which Python has no size limit
_WRITER, _READER = json.JSONEncoder(separators=(",", ":")), json.JSONDecoder()
_NO_DATA = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


class CodecError(Exception):
    """The value cannot be encoded, or the data does not describe a value."""


def encode(value: Any) -> bytes:
    """The value as JSON; CodecError if a part of it is not data."""
    return _Encoder().encode(value)


class _Encoder:
    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._indices: dict[int, int] = {}
        self._alive: list[Any] = []  # keeps ids unique while encoding
        self._waiting: deque[tuple[int, str, Any]] = deque()

    def encode(self, value: Any) -> bytes:
        try:
            root = self._reference(value)
            while self._waiting:
                index, kind, item = self._waiting.popleft()
                self._nodes[index] = [kind, *self._contents(kind, item)]
            return _WRITER.encode([root, self._nodes]).encode()
        except (RecursionError, ValueError) as error:
            raise CodecError(str(error)) from None

    def _reference(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            if kind is int and not -_JSON_INT < value < _JSON_INT:
                return self._add(["int", hex(value)])
            return value
        index = self._indices.get(id(value))
        if index is not None:
            return [index]
        if isinstance(value, (int, float, str)):
            return self._reference(_plain(value))
        if isinstance(value, (bytes, bytearray)):
            return self._add(["bytes", bytes(value).hex()])
        if isinstance(value, complex):
            return self._add(["complex", value.real, value.imag])
        numpy = sys.modules.get("numpy")
        if numpy and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc":
            return self._add(["numpy", value.dtype.str, list(value.shape), value.tobytes().hex()])
        self._alive.append(value)
        if isinstance(value, (tuple, frozenset)):  # after its contents: the reader creates it complete
            name = "tuple" if isinstance(value, tuple) else "frozenset"
            reference = self._add([name, self._references(value)])
            self._indices[id(value)] = reference[0]
            return reference
        reference = self._add(None)
        self._indices[id(value)] = reference[0]
        self._waiting.append((reference[0], _kind_of(value), value))
        return reference

    def _references(self, values: Any) -> list[Any]:
        values = list(values)
        if _ATOMS.issuperset(map(type, values)) and not any(
            type(value) is int and not -_JSON_INT < value < _JSON_INT for value in values
        ):
            return values  # type: ignore[no-any-return]
        return [self._reference(value) for value in values]

    def _contents(self, kind: str, value: Any) -> list[Any]:
        if kind == "dict":
            return [self._references(dict.keys(value)), self._references(dict.values(value))]
        if kind == "object":
            attributes = vars(value)
            return [type(value).__name__, list(map(str, attributes)), self._references(attributes.values())]
        return [self._references(value)]

    def _add(self, node: Any) -> list[int]:
        self._nodes.append(node)
        return [len(self._nodes) - 1]


def _plain(value: Any) -> int | float | str:
    """The number or text of a subclass's instance, read by the builtin type's methods."""
    if isinstance(value, int):
        return int.__index__(value)
    return float.__mul__(value, 1.0) if isinstance(value, float) else str.__str__(value)


def _kind_of(value: Any) -> str:
    for kind in (list, dict, set, deque):
        if isinstance(value, kind):
            return kind.__name__
    if hasattr(value, "__dict__") and not isinstance(value, _NO_DATA):
        return "object"
    raise CodecError(f"a value of type {type(value).__name__} is not plain data")


def decode(data: bytes, find_class: Callable[[str], Any]) -> Any:
    """The value that `data` describes; CodecError if it describes none.

    `find_class` maps a name to the class that its objects get, and to anything but a class for
    unknown names.
    """
    try:
        root, nodes = _READER.decode(data.decode())
        return _decode(root, nodes, find_class)
    except CodecError:
        raise
    except Exception as error:
        raise CodecError(f"no value: {type(error).__name__}") from None


def _numpy(kind: str, shape: list[int], data: str) -> Any:
    if not re.fullmatch(r"[<>|][biufc]\d+", kind):
        raise CodecError(f"an array of {kind!r}")
    numpy = sys.modules["numpy"]
    return numpy.frombuffer(bytes.fromhex(data), kind).reshape(shape).copy()[()]  # a scalar if it has no axes


_SHELLS = {"list": list, "dict": dict, "set": set, "deque": deque}
_WHOLE: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "complex": complex,
    "numpy": _numpy,
}
_PENDING = object()


def _decode(root: Any, nodes: list[Any], find_class: Callable[[str], Any]) -> Any:
    values = [_shell(node, find_class) for node in nodes]

    def value(reference: Any) -> Any:
        if type(reference) is not list:
            if type(reference) not in _ATOMS:
                raise CodecError("a container outside the table")
            return reference
        (index,) = reference
        found = values[index]
        if found is _PENDING:
            raise CodecError("a tuple before its contents")
        return found

    for index, node in enumerate(nodes):
        if node[0] in ("tuple", "frozenset"):
            made = [value(item) for item in node[1]]
            values[index] = tuple(made) if node[0] == "tuple" else frozenset(made)
    for node, shell in zip(nodes, values, strict=True):
        if node[0] in ("list", "deque"):
            shell.extend([value(item) for item in node[1]])
        elif node[0] == "object":
            vars(shell).update(zip(map(str, node[2]), map(value, node[3]), strict=True))
    for node, shell in zip(nodes, values, strict=True):  # last, since hashes of keys depend on their contents
        if node[0] == "set":
            shell.update(map(value, node[1]))
        elif node[0] == "dict":
            shell.update(zip(map(value, node[1]), map(value, node[2]), strict=True))
    return value(root)


def _shell(node: list[Any], find_class: Callable[[str], Any]) -> Any:
    kind = node[0]
    if kind in _SHELLS:
        return _SHELLS[kind]()
    if kind in _WHOLE:
        return _WHOLE[kind](*node[1:])
    if kind == "object":
        found = find_class(node[1])
        if not isinstance(found, type):
            raise CodecError(f"an object of a class {node[1]!r} that is unknown here")
        return object.__new__(found)
    if kind in ("tuple", "frozenset"):
        return _PENDING
    raise CodecError(f"a node of kind {kind!r}")
