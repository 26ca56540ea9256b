"""Python values as inert data: a solution's result reaches the judge as numbers, strings and
containers, or not at all.

A value is encoded as a flat table of nodes in JSON. The table preserves linked lists of any length,
shared parts and cycles; JSON's reader is safe on hostile input. A container is referenced by its
index in the table, as `[index]`. The builtin and standard library types below keep their type;
subclasses become the type that they extend: an `int` whose `__eq__` is always true arrives as a
plain int. NumPy's numeric arrays and scalars are supported where NumPy is loaded. Instances of a
class written in Python are encoded as the class's name and attributes. They are created again
without calling any method, if the reader knows a class of that name.

Functions, iterators, files and the like are not data. The writer may `export` them as handles, which
the reader resolves.
"""

import array
import builtins
import datetime
import json
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath
from types import (
    BuiltinFunctionType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any
from uuid import UUID

__all__ = ["DATA", "CodecError", "Encoder", "decode", "decode_parts", "encode"]

_ATOMS = frozenset({type(None), bool, int, float, str})
_JSON_INT = 1 << 63  # larger ones are written in hexadecimal, for which Python has no size limit
_WRITER, _READER = json.JSONEncoder(separators=(",", ":")), json.JSONDecoder()
_NO_DATA = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, GeneratorType)
_VIEWS: dict[Any, str] = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_DATES: tuple[Any, ...] = (datetime.datetime, datetime.date, datetime.time)
_TEXTS: tuple[Any, ...] = (UUID, PosixPath, PurePosixPath)
_TYPES = {kind.__name__: kind for kind in vars(builtins).values() if isinstance(kind, type)}
DATA = (int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset, deque, array.array, range, memoryview, Decimal, Fraction, datetime.timedelta, *_DATES, *_VIEWS, *_TEXTS)  # fmt: skip
"""The types that travel as data, their subclasses too."""
_MUTABLE = {"list", "dict", "OrderedDict", "Counter", "defaultdict", "set", "deque", "bytearray", "array", "ndarray", "object"}  # fmt: skip


class CodecError(Exception):
    """The value cannot be encoded, or the data does not describe a value."""


def encode(value: Any) -> bytes:
    """The value as JSON; CodecError if a part of it is not data."""
    return Encoder().encode(value)


class Encoder:
    """Encodes one value. `export(part)` may return the contents of a handle for a part."""

    def __init__(self, export: Callable[[Any], Sequence[Any] | None] | None = None) -> None:
        self._export = export
        self._nodes: list[Any] = []
        self._indices: dict[int, int] = {}
        self._waiting: deque[tuple[int, str, Any]] = deque()
        self._alive: list[Any] = []  # keeps ids unique while encoding
        self.mutable: list[Any] = []
        """The parts that a callee can change, in the order of `decode_parts`."""

    def encode(self, value: Any) -> bytes:
        """The value as JSON; CodecError if a part of it is not data."""
        try:
            root = self._reference(value)
            while self._waiting:
                index, kind, item = self._waiting.popleft()
                self._nodes[index] = [kind, *self._contents(kind, item)]
            return _WRITER.encode([root, self._nodes]).encode()
        except (RecursionError, ValueError, RuntimeError) as error:
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
        if isinstance(value, (int, float, str)) and not isinstance(value, Enum):
            return self._reference(_plain(value))
        self._alive.append(value)
        if self._export is not None and (handle := self._export(value)) is not None:
            return self._keep(value, ["handle", *handle])
        if (node := self._whole(value)) is not None:
            return self._keep(value, node)
        name = _kind_of(value)
        reference = self._keep(value, None)
        if name in _MUTABLE:
            self.mutable.append(value)
        self._waiting.append((reference[0], name, value))
        return reference

    def _whole(self, value: Any) -> Any:
        """The node of a value that the reader creates complete, after its parts; None for others."""
        if isinstance(value, Enum):
            plain = isinstance(value, (int, float, str))
            return ["enum", type(value).__name__, self._reference(value._value_), plain]
        if isinstance(value, (tuple, frozenset)):
            if hasattr(type(value), "_fields"):
                return ["named", type(value).__name__, self._references(value)]
            return ["tuple" if isinstance(value, tuple) else "frozenset", self._references(value)]
        if isinstance(value, (bytes, memoryview)):
            return ["bytes", bytes(value).hex()]
        if isinstance(value, complex):
            return ["complex", value.real, value.imag]
        if isinstance(value, range):
            return ["range", hex(value.start), hex(value.stop), hex(value.step)]
        if isinstance(value, Decimal):
            return ["Decimal", str(Decimal(value))]
        if isinstance(value, Fraction):
            return ["Fraction", hex(int(value.numerator)), hex(int(value.denominator))]
        if isinstance(value, datetime.timedelta):
            return ["timedelta", value.days, value.seconds, value.microseconds]
        for kind in _DATES:
            if isinstance(value, kind):
                return [kind.__name__, kind.isoformat(value)]
        if type(value) in _TEXTS:
            return [type(value).__name__, str(value)]
        for view, name in _VIEWS.items():
            if isinstance(value, view):
                return [name, self._reference(dict(value.mapping))]
        if isinstance(value, type) and _TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        numpy = sys.modules.get("numpy")
        if numpy and isinstance(value, numpy.generic) and value.dtype.kind in "biufc":
            return ["numpy", value.dtype.str, [], value.tobytes().hex()]
        return None

    def _references(self, values: Any) -> list[Any]:
        values = list(values)
        if _ATOMS.issuperset(map(type, values)) and not any(
            type(value) is int and not -_JSON_INT < value < _JSON_INT for value in values
        ):
            return values  # type: ignore[no-any-return]
        return [self._reference(value) for value in values]

    def _contents(self, kind: str, value: Any) -> list[Any]:
        if kind in ("dict", "OrderedDict", "Counter", "defaultdict"):
            own: Any = OrderedDict if kind == "OrderedDict" else dict
            pairs = [self._references(own.keys(value)), self._references(own.values(value))]
            return [*pairs, self._reference(value.default_factory)] if kind == "defaultdict" else pairs
        if kind == "object":
            attributes = _attributes(value)
            return [type(value).__name__, list(map(str, attributes)), self._references(attributes.values())]
        if kind == "ndarray":
            return [value.dtype.str, list(value.shape), value.tobytes().hex()]
        if kind == "bytearray":
            return [bytes(value).hex()]
        if kind == "array":
            return [value.typecode, value.tobytes().hex()]
        return [self._references(value), *([value.maxlen] if kind == "deque" else [])]

    def _keep(self, value: Any, node: Any) -> list[int]:
        reference = self._add(node)
        self._indices[id(value)] = reference[0]
        return reference

    def _add(self, node: Any) -> list[int]:
        self._nodes.append(node)
        return [len(self._nodes) - 1]


def _plain(value: Any) -> int | float | str:
    """The number or text of a subclass's instance, read by the builtin type's methods."""
    if isinstance(value, int):
        return int.__index__(value)
    return float.__mul__(value, 1.0) if isinstance(value, float) else str.__str__(value)


def _kind_of(value: Any) -> str:
    for kind in (list, OrderedDict, Counter, defaultdict, dict, set, deque, bytearray, array.array):
        if isinstance(value, kind):
            return kind.__name__
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        return "ndarray"
    written = hasattr(value, "__dict__") or hasattr(type(value), "__slots__")
    if written and type(value).__module__ != "builtins" and not isinstance(value, _NO_DATA):
        if hasattr(type(value), "__next__"):
            raise CodecError(f"an iterator of type {type(value).__name__} is not plain data")
        return "object"
    raise CodecError(f"a value of type {type(value).__name__} is not plain data")


def _slots(kind: type) -> dict[str, MemberDescriptorType]:
    members = [vars(base) for base in reversed(kind.__mro__)]
    return {n: m for names in members for n, m in names.items() if isinstance(m, MemberDescriptorType)}


def _attributes(value: Any) -> dict[str, Any]:
    kind = type(value)
    slots = {name: member for name, member in _slots(kind).items() if hasattr(value, name)}
    return {**{n: m.__get__(value, kind) for n, m in slots.items()}, **getattr(value, "__dict__", {})}


def decode(
    data: bytes, find_class: Callable[[str], Any], find_handle: Callable[..., Any] | None = None
) -> Any:
    """The value that `data` describes; CodecError if it describes none.

    `find_class` maps a name to the class that its objects get, and to anything but a class for
    unknown names. `find_handle` gets the contents of each handle.
    """
    return decode_parts(data, find_class, find_handle)[0]


def decode_parts(
    data: bytes,
    find_class: Callable[[str], Any],
    find_handle: Callable[..., Any] | None = None,
    into: Sequence[Any] | None = None,
) -> tuple[Any, list[Any]]:
    """The value and its parts that can change, in the order of `Encoder.mutable`.

    With `into`, the second item of the value is a list of new states of these objects:
    they take these states, keep their identity, and stand for the states in the value.
    """
    try:
        root, nodes = _READER.decode(data.decode())
        return _decode(root, nodes, find_class, find_handle, into)
    except CodecError:
        raise
    except Exception as error:
        raise CodecError(f"no value: {type(error).__name__}") from None


def _numpy(kind: str, shape: list[int], data: str) -> Any:
    if not re.fullmatch(r"[<>|][biufc]\d+", kind):
        raise CodecError(f"an array of {kind!r}")
    numpy = sys.modules["numpy"]
    return numpy.frombuffer(bytes.fromhex(data), kind).reshape(shape).copy()[()]  # a scalar if it has no axes


def _array(code: str, data: str) -> Any:
    return array.array(code, bytes.fromhex(data))


_DICTS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_WHOLE: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "complex": complex,
    "numpy": _numpy,
    "range": lambda *parts: range(*(int(part, 16) for part in parts)),
    "Decimal": Decimal,
    "Fraction": lambda above, below: Fraction(int(above, 16), int(below, 16)),
    "timedelta": datetime.timedelta,
    "type": _TYPES.__getitem__,
    **{kind.__name__: kind.fromisoformat for kind in _DATES},
    **{kind.__name__: kind for kind in _TEXTS},
    "list": lambda items: [],
    "set": lambda items: set(),
    "deque": lambda items, longest: deque(maxlen=longest),
    "defaultdict": lambda keys, values, factory: defaultdict(),
    "bytearray": bytearray.fromhex,
    "array": _array,
    "ndarray": _numpy,
}
_PENDING = object()


def _decode(
    root: Any,
    nodes: list[Any],
    find_class: Callable[[str], Any],
    find_handle: Callable[..., Any] | None,
    into: Sequence[Any] | None,
) -> tuple[Any, list[Any]]:
    ours: dict[int, Any] = {}
    if into is not None:
        (_, (states,), *_) = nodes[root[0]][1]
        ours = {index: old for (index,), old in zip(nodes[states][1], into, strict=True)}
    values = [_shell(node, find_class, find_handle) for node in nodes]
    for index, old in ours.items():
        if type(values[index]) is not type(old):
            raise CodecError("an argument came back as another type")
        if nodes[index][0] in ("ndarray", "bytearray", "array"):
            old[... if nodes[index][0] == "ndarray" else slice(None)] = values[index]
        values[index] = old

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
        if values[index] is _PENDING:
            values[index] = _after_parts(node, value, find_class)
    filled = list(zip(nodes, values, strict=True))
    for node, shell in filled:
        if node[0] in ("list", "deque"):
            items = [value(item) for item in node[1]]
            shell.clear()
            shell.extend(items)
        elif node[0] == "object":
            attributes = dict(zip(map(str, node[2]), map(value, node[3]), strict=True))
            slots = _slots(type(shell))
            for name in slots.keys() & attributes.keys():
                slots[name].__set__(shell, attributes.pop(name))
            if attributes or hasattr(shell, "__dict__"):
                vars(shell).clear()
                vars(shell).update(attributes)
    for node, shell in filled:  # last, since hashes of keys depend on their contents
        if node[0] == "set":
            shell.clear()
            shell.update([value(item) for item in node[1]])
        elif node[0] in _DICTS or node[0] == "defaultdict":
            if node[0] == "defaultdict":
                shell.default_factory = value(node[3])
            pairs = list(zip(map(value, node[1]), map(value, node[2]), strict=True))
            shell.clear()
            for key, item in pairs:
                shell[key] = item
    return value(root), [part for node, part in filled if node[0] in _MUTABLE]


def _after_parts(node: list[Any], value: Callable[[Any], Any], find_class: Callable[[str], Any]) -> Any:
    kind = node[0]
    if kind in ("tuple", "frozenset"):
        made = [value(item) for item in node[1]]
        return tuple(made) if kind == "tuple" else frozenset(made)
    if kind == "named":
        items = tuple(value(item) for item in node[2])
        found = find_class(node[1])
        known = isinstance(found, type) and issubclass(found, tuple) and len(found._fields) == len(items)  # type: ignore[attr-defined]
        return tuple.__new__(found, items) if known else items
    if kind == "enum":
        found = find_class(node[1])
        if isinstance(found, type) and issubclass(found, Enum):
            return found(value(node[2]))
        if node[3] is True:
            return value(node[2])
        raise CodecError(f"a member of the enumeration {node[1]!r}, which the tests do not define")
    return getattr(dict, kind)(value(node[1]))  # a view


def _shell(node: list[Any], find_class: Callable[[str], Any], find_handle: Callable[..., Any] | None) -> Any:
    kind = node[0]
    if kind in _DICTS:
        return _DICTS[kind]()
    if kind in _WHOLE:
        return _WHOLE[kind](*node[1:])
    if kind == "object":
        found = find_class(node[1])
        if not isinstance(found, type):
            raise CodecError(f"an object of a class {node[1]!r} that is unknown here")
        return object.__new__(found)
    if kind == "handle" and find_handle is not None:
        return find_handle(*node[1:])
    if kind in ("tuple", "frozenset", "named", "enum", *_VIEWS.values()):
        return _PENDING
    raise CodecError(f"a node of kind {kind!r}")
