"""Python values as inert data: a solution's result reaches the judge as numbers, strings and
containers, or not at all.

A value is encoded as a flat table of nodes in JSON. The table preserves linked lists of any length,
shared parts and cycles; JSON's reader is safe on hostile input. A container is referenced by its
index in the table, as `[index]`. The builtin and standard library types below keep their type;
subclasses become the type that they extend: an `int` whose `__eq__` is always true arrives as a
plain int. NumPy's numeric arrays and scalars are supported where NumPy is loaded. Instances of a
class written in Python are encoded as the class's name and attributes. They are created again
without calling any method, if the reader knows a class of that name.

Functions, iterators, files and the like are not data. The writer may `export` them as handles,
which the reader resolves.
"""

import array
import builtins
import json
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath
from typing import Any
from uuid import UUID

FindClass = Callable[[str], Any]
"""Maps a name to the class that its objects get, and to anything but a class for unknown names."""
FindHandle = Callable[..., Any] | None
"""Gets the contents of each handle."""

_ATOMS = frozenset({type(None), bool, int, float, str})
_JSON_INT = 1 << 63  # larger ones are written in hexadecimal, for which Python has no size limit
_WRITER, _READER = json.JSONEncoder(separators=(",", ":")), json.JSONDecoder()
_NO_DATA = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_TYPES = {kind.__name__: kind for kind in vars(builtins).values() if isinstance(kind, type)}


def _integers(*texts: str) -> list[int]:
    return [int(text, 16) for text in texts]


def _array(code: str, data: str) -> Any:
    return array.array(code, bytes.fromhex(data))


def _numpy(kind: str, shape: list[int], data: str) -> Any:
    if not re.fullmatch(r"[<>|][biufc]\d+", kind):
        raise CodecError(f"an array of {kind!r}")
    numpy = sys.modules["numpy"]
    return numpy.frombuffer(bytes.fromhex(data), kind).reshape(shape).copy()[()]  # a scalar if it has no axes


_PLAIN: dict[str, tuple[Any, Callable[[Any], list[Any]], Callable[..., Any]]] = {
    # types without parts: type, how to write the contents, how to read them
    "bytes": (bytes, lambda v: [v.hex()], bytes.fromhex),
    "memoryview": (memoryview, lambda v: [v.tobytes().hex()], bytes.fromhex),
    "bytearray": (bytearray, lambda v: [v.hex()], bytearray.fromhex),
    "complex": (complex, lambda v: [v.real, v.imag], complex),
    "range": (range, lambda v: [hex(v.start), hex(v.stop), hex(v.step)], lambda *v: range(*_integers(*v))),
    "Decimal": (Decimal, lambda v: [str(Decimal(v))], Decimal),
    "Fraction": (Fraction, lambda v: [*map(hex, v.as_integer_ratio())], lambda *v: Fraction(*_integers(*v))),
    "timedelta": (timedelta, lambda v: [v.days, v.seconds, v.microseconds], timedelta),
    "datetime": (datetime, lambda v: [datetime.isoformat(v)], datetime.fromisoformat),
    "date": (date, lambda v: [date.isoformat(v)], date.fromisoformat),
    "time": (time, lambda v: [time.isoformat(v)], time.fromisoformat),
    "UUID": (UUID, lambda v: [str(v)], UUID),
    "PosixPath": (PosixPath, lambda v: [str(v)], PosixPath),
    "PurePosixPath": (PurePosixPath, lambda v: [str(v)], PurePosixPath),
    "array": (array.array, lambda v: [v.typecode, v.tobytes().hex()], _array),
}
_EMPTY: dict[str, tuple[type, Callable[..., Any]]] = {
    # types whose parts are filled in when all nodes exist: type, how to create an empty one
    "list": (list, lambda items: []),
    "OrderedDict": (OrderedDict, lambda keys, values: OrderedDict()),
    "Counter": (Counter, lambda keys, values: Counter()),
    "defaultdict": (defaultdict, lambda keys, values, factory: defaultdict()),
    "dict": (dict, lambda keys, values: {}),
    "set": (set, lambda items: set()),
    "deque": (deque, lambda items, longest: deque(maxlen=longest)),
}
_FROZEN: dict[str, Any] = {  # types that are created from their parts
    "tuple": tuple,
    "frozenset": frozenset,
    **{name: type(getattr({}, name)()) for name in ("keys", "values", "items")},
}
_KINDS = {
    **{name: kind for name, (kind, _) in _EMPTY.items()},
    **_FROZEN,
    **{name: kind for name, (kind, _, _) in _PLAIN.items()},
}
_READERS: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "type": _TYPES.__getitem__,
    "numpy": _numpy,
    "ndarray": _numpy,
    **{name: read for name, (_, _, read) in _PLAIN.items()},
    **{name: make for name, (_, make) in _EMPTY.items()},
}
_MUTABLE = {*_EMPTY, "bytearray", "array", "ndarray", "object"}
_DICTS = {name for name, (kind, _) in _EMPTY.items() if issubclass(kind, dict)}
DATA = (int, float, str, *_KINDS.values())
"""The types that travel as data, their subclasses too."""


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
        if type(value) in _ATOMS:
            return self._add(["int", hex(value)]) if _is_large(value) else value
        if (index := self._indices.get(id(value))) is not None:
            return [index]
        if isinstance(value, (int, float, str)) and not isinstance(value, Enum):
            return self._reference(_plain(value))
        self._alive.append(value)
        if self._export is not None and (handle := self._export(value)) is not None:
            return self._keep(value, "handle", handle)
        kind = _kind_of(value)
        if kind in _EMPTY or kind == "object":
            reference = self._keep(value, kind, ())
            self._waiting.append((reference[0], kind, value))
            return reference
        return self._keep(value, kind, self._contents(kind, value))

    def _references(self, values: Any) -> list[Any]:
        values = list(values)
        if _ATOMS.issuperset(map(type, values)) and not any(map(_is_large, values)):
            return values  # type: ignore[no-any-return]
        return [self._reference(value) for value in values]

    def _contents(self, kind: str, value: Any) -> Sequence[Any]:
        if kind in _PLAIN:
            return _PLAIN[kind][1](value)
        if kind in _DICTS:
            own: Any = OrderedDict if kind == "OrderedDict" else dict
            pairs = [self._references(own.keys(value)), self._references(own.values(value))]
            return [*pairs, self._reference(value.default_factory)] if kind == "defaultdict" else pairs
        name = type(value).__name__
        if kind == "object":
            attributes = _attributes(value)
            return name, list(map(str, attributes)), self._references(attributes.values())
        if kind == "named":
            return name, self._references(value)
        if kind == "enum":
            return name, self._reference(value._value_), isinstance(value, (int, float, str))
        if kind == "type":
            return (value.__name__,)
        if kind in ("numpy", "ndarray"):
            return value.dtype.str, value.shape, value.tobytes().hex()
        if hasattr(value, "mapping"):
            return (self._reference(dict(value.mapping)),)
        return self._references(value), *([value.maxlen] if kind == "deque" else [])

    def _keep(self, value: Any, kind: str, contents: Sequence[Any]) -> list[int]:
        reference = self._add([kind, *contents])
        self._indices[id(value)] = reference[0]
        if kind in _MUTABLE:
            self.mutable.append(value)
        return reference

    def _add(self, node: list[Any]) -> list[int]:
        self._nodes.append(node)
        return [len(self._nodes) - 1]


def _is_large(value: Any) -> bool:
    return type(value) is int and not -_JSON_INT < value < _JSON_INT


def _plain(value: Any) -> int | float | str:
    """The number or text of a subclass's instance, read by the builtin type's methods."""
    if isinstance(value, int):
        return int.__index__(value)
    return float.__mul__(value, 1.0) if isinstance(value, float) else str.__str__(value)


def _kind_of(value: Any) -> str:
    if isinstance(value, Enum):
        return "enum"
    if isinstance(value, tuple) and hasattr(type(value), "_fields"):
        return "named"
    for name, kind in _KINDS.items():
        if isinstance(value, kind):
            return name
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return "type"
    numpy = sys.modules.get("numpy")
    for name, kind in (("numpy", numpy.generic), ("ndarray", numpy.ndarray)) if numpy else ():
        if isinstance(value, kind) and value.dtype.kind in "biufc":
            return name
    written = (hasattr(value, "__dict__") or hasattr(type(value), "__slots__")) and not hasattr(
        type(value), "__next__"
    )
    if written and type(value).__module__ != "builtins" and not isinstance(value, _NO_DATA):
        return "object"
    raise CodecError(f"a value of type {type(value).__name__} is not plain data")


def _slots(kind: type) -> dict[str, types.MemberDescriptorType]:
    members = [vars(base) for base in reversed(kind.__mro__)]
    return {n: m for names in members for n, m in names.items() if isinstance(m, types.MemberDescriptorType)}


def _attributes(value: Any) -> dict[str, Any]:
    kind = type(value)
    slots = {name: member for name, member in _slots(kind).items() if hasattr(value, name)}
    return {**{n: m.__get__(value, kind) for n, m in slots.items()}, **getattr(value, "__dict__", {})}


def decode(data: bytes, find_class: FindClass, find_handle: FindHandle = None) -> Any:
    """The value that `data` describes; CodecError if it describes none."""
    return decode_parts(data, find_class, find_handle)[0]


def decode_parts(
    data: bytes, find_class: FindClass, find_handle: FindHandle = None, into: Sequence[Any] | None = None
) -> tuple[Any, list[Any]]:
    """The value and its parts that can change, in the order of `Encoder.mutable`.

    With `into`, the second item of the value is a list of new states of these objects:
    they take these states, keep their identity, and stand for the states in the value.
    """
    try:
        root, nodes = _READER.decode(data.decode())
        values = [_shell(node, find_class, find_handle) for node in nodes]
        if into is not None:
            _take_states(root, nodes, values, into)
        return _fill(root, nodes, values, find_class)
    except CodecError:
        raise
    except Exception as error:
        raise CodecError(f"no value: {type(error).__name__}") from None


_PENDING = object()


def _shell(node: list[Any], find_class: FindClass, find_handle: FindHandle) -> Any:
    kind, *contents = node
    if kind in _READERS:
        return _READERS[kind](*contents)
    if kind == "object":
        found = find_class(contents[0])
        if not isinstance(found, type):
            raise CodecError(f"an object of a class {contents[0]!r} that is unknown here")
        return object.__new__(found)
    if kind == "handle" and find_handle is not None:
        return find_handle(*contents)
    if kind in _FROZEN or kind in ("named", "enum"):
        return _PENDING
    raise CodecError(f"a node of kind {kind!r}")


def _take_states(root: Any, nodes: list[Any], values: list[Any], into: Sequence[Any]) -> None:
    """Put the objects `into` in the place of their new states."""
    (_, (states,), *_) = nodes[root[0]][1]
    for (index,), old in zip(nodes[states][1], into, strict=True):
        if type(values[index]) is not type(old):
            raise CodecError("an argument came back as another type")
        if nodes[index][0] in ("ndarray", "bytearray", "array"):
            old[... if nodes[index][0] == "ndarray" else slice(None)] = values[index]
        values[index] = old


def _fill(root: Any, nodes: list[Any], values: list[Any], find_class: FindClass) -> tuple[Any, list[Any]]:
    def value(reference: Any) -> Any:
        if type(reference) is not list:
            if type(reference) not in _ATOMS:
                raise CodecError("a container outside the table")
            return reference
        (index,) = reference
        if values[index] is _PENDING:
            raise CodecError("a tuple before its contents")
        return values[index]

    for index, node in enumerate(nodes):
        if values[index] is _PENDING:
            values[index] = _frozen(node, value, find_class)
    filled = list(zip(nodes, values, strict=True))
    for (kind, *contents), shell in filled:
        if kind in ("list", "deque"):
            items = [value(item) for item in contents[0]]
            shell.clear()
            shell.extend(items)
        elif kind == "object":
            attributes = dict(zip(map(str, contents[1]), map(value, contents[2]), strict=True))
            slots = _slots(type(shell))
            for name in slots.keys() & attributes.keys():
                slots[name].__set__(shell, attributes.pop(name))
            if attributes or hasattr(shell, "__dict__"):
                vars(shell).clear()
                vars(shell).update(attributes)
    for (kind, *contents), shell in filled:  # last, since hashes of keys depend on their contents
        if kind == "set":
            shell.clear()
            shell.update([value(item) for item in contents[0]])
        elif kind in _DICTS:
            if kind == "defaultdict":
                shell.default_factory = value(contents[2])
            pairs = list(zip(map(value, contents[0]), map(value, contents[1]), strict=True))
            shell.clear()
            for key, item in pairs:
                shell[key] = item
    return value(root), [part for node, part in filled if node[0] in _MUTABLE]


def _frozen(node: list[Any], value: Callable[[Any], Any], find_class: FindClass) -> Any:
    kind, first, *others = node
    if kind in ("tuple", "frozenset"):
        return _FROZEN[kind](map(value, first))
    if kind == "named":
        items = tuple(map(value, others[0]))
        found = find_class(first)
        known = isinstance(found, type) and issubclass(found, tuple) and len(found._fields) == len(items)  # type: ignore[attr-defined]
        return tuple.__new__(found, items) if known else items
    if kind == "enum":
        found = find_class(first)
        if isinstance(found, type) and issubclass(found, Enum):
            return found(value(others[0]))
        if others[1] is True:
            return value(others[0])
        raise CodecError(f"a member of the enumeration {first!r}, which the tests do not define")
    return getattr(dict, kind)(value(first))  # a view
