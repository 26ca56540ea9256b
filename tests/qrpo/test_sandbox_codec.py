"""Values as inert data: what crosses comes out equal and plain, and what is hostile comes out as an error."""

import json
import math
import struct
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo.sandbox.inside.codec import CodecError, Encoder, decode, decode_parts, encode
from qrpo.sandbox.inside.framing import HEADER, frame, frame_end
from qrpo.sandbox.inside.seccomp import ALLOWED, build_filter

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.recursive(
    ATOMS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5
)
VALUES = st.recursive(
    KEYS,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner)
        | st.sets(KEYS)
        | st.builds(deque, st.lists(inner))
    ),
    max_leaves=20,
)


class Node:
    def __init__(self, value: Any, following: Any = None):
        self.value, self.next = value, following


class Level(IntEnum):
    HIGH = 2


class Color(Enum):
    RED = (1, 2)


class Slotted:
    __slots__ = ("__dict__", "a", "b")


@dataclass(frozen=True)
class Point:
    x: int
    y: Any = ()


Pair = namedtuple("Pair", "first second")
CLASSES = {"Level": Level, "Color": Color, "Slotted": Slotted, "Point": Point, "Pair": Pair}


@pytest.mark.parametrize(
    "value",
    [
        range(3, 10**30, 7),
        Decimal("1.50"),
        Fraction(-(10**30), 7),
        date(2024, 2, 29),
        datetime(2024, 2, 29, 1, 2, 3, 4, UTC),
        time(1, 2, 3),
        timedelta(days=-1, microseconds=1),
        Counter("aab"),
        OrderedDict(b=1, a=2),
        defaultdict(list, {1: [2]}),
        deque([1, 2], 2),
        bytearray(b"x"),
        array("d", [0.5]),
        Level.HIGH,
        Color.RED,
        Pair(1, [2]),
        Point(1, Point(2)),
        {Point(1): int, Color.RED: None},
    ],
)
def test_standard_types_and_classes_of_the_reader_keep_type_and_value(value: Any) -> None:
    (back,) = decode(encode([value]), CLASSES.get)
    assert type(back) is type(value)
    assert back == value
    assert repr(back) == repr(value)


def test_views_and_slots_arrive() -> None:
    slotted = Slotted()
    slotted.b, slotted.c = 1, [slotted]
    keys, items, back = decode(encode([{1: 2}.keys(), {1: 2}.items(), slotted]), CLASSES.get)
    assert (keys, items) == ({1}, {(1, 2)})
    assert (back.b, back.c, hasattr(back, "a")) == (1, [back], False)


def test_changed_parts_keep_their_identity() -> None:
    row: list[int] = [1]
    ours: Any = [[row, row], deque([1]), bytearray(b"a"), array("i", [1]), Counter("a"), {1}, np.zeros(2)]
    encoder = Encoder()
    (rows, queue, data, numbers, counts, members, vector), parts = decode_parts(
        encoder.encode(ours), CLASSES.get
    )
    rows[0].append(2)
    queue.append(2), data.append(98), numbers.append(2), counts.update("a"), members.add(2)
    vector += 1
    (found, _), _ = decode_parts(encode([rows[1], parts]), CLASSES.get, None, encoder.mutable)
    assert found is row is ours[0][0] is ours[0][1]
    assert row == [1, 2]
    assert ours[1:6] == [deque([1, 2]), bytearray(b"ab"), array("i", [1, 2]), Counter("aa"), {1, 2}]
    assert ours[6].tolist() == [1, 1]


@settings(max_examples=60)
@given(VALUES)
def test_plain_values_come_back_equal_and_of_the_same_types(value: Any) -> None:
    back = decode(encode(value), {}.get)
    assert back == value
    assert type(back) is type(value)


@settings(max_examples=60)
@given(st.lists(ATOMS))
def test_atoms_keep_their_types(values: list[Any]) -> None:
    back = decode(encode(values), {}.get)
    assert list(map(type, back)) == list(map(type, values))  # True == 1 == 1.0
    assert list(map(repr, back)) == list(map(repr, values))


def test_subclasses_become_the_builtin_types_they_are() -> None:
    class Agreeable(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    point = namedtuple("point", "x y")
    for value, plain in [
        (Agreeable(7), 7),
        (type("Table", (dict,), {})(a=1), {"a": 1}),
        (point(1, 2), (1, 2)),
        (Level.HIGH, 2),
        (type("Text", (str,), {})("x"), "x"),
        (type("Real", (float,), {})(-0.0), -0.0),
    ]:
        back = decode(encode(value), {}.get)
        assert type(back) is type(plain)
        assert back == plain
    assert math.copysign(1, decode(encode(type("Real", (float,), {})(-0.0)), {}.get)) == -1


def test_shared_parts_cycles_and_long_chains_survive() -> None:
    shared: list[Any] = [1]
    shared.append(shared)
    first, second = decode(encode([shared, shared]), {}.get)
    assert first is second
    assert first[1] is first
    chain = None
    for value in range(20_000):
        chain = Node(value, chain)
    back = decode(encode(chain), {"Node": Node}.get)
    count = 0
    while back is not None:
        count, back = count + 1, back.next
    assert count == 20_000


@pytest.mark.parametrize(
    "value", [len, print, iter([1]), (n for n in [1]), object(), Color, json, lambda: 1, map(int, [])]
)
def test_what_is_no_data_does_not_travel(value: Any) -> None:
    with pytest.raises(CodecError):
        encode(value)
    with pytest.raises(CodecError):
        encode([{"deep": (value,)}])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[1]",
        b"[[0],[]]",
        b"[[0],[[]]]",
        b'[[0],[["function","len"]]]',
        b'[[0],[["object","Node",["x"],[]]]]',
        b'[[0],[["object","Suite",[],[]]]]',
        b'[[0],[["tuple",[[0]]]]]',
        b'[[0],[["set",[[0]]]]]',
        b'[[0],[["dict",[[0]],[1]]]]',
        b'[[0],[["list",[{"a":1}]]]]',
        b'[{"a":1},[]]',
        b"[" * 100_000,
        b"\xff\xfe",
        b'[["0"],[["list",[]]]]',
        b'[[0],[["numpy","O",[1],"00"]]]',
        b'[[0],[["numpy","<f8",[-5],"00"]]]',
        b"9" * 10_000,
    ],
)
def test_hostile_data_is_an_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data, {"Node": Node, "len": len}.get)


def test_a_message_ends_where_it_is_complete() -> None:
    stream = frame(b"one") + frame(b"")
    assert [frame_end(stream[:length], 0) for length in range(HEADER + 4)] == [None] * (HEADER + 3) + [
        HEADER + 3
    ]
    assert frame_end(stream, HEADER + 3) == len(stream)
    assert frame_end(stream, len(stream)) is None
    assert frame_end(b"\xff" * 100, 0) is None


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6).reshape(2, 3)[:, ::-1],
        np.zeros((0, 3), ">f4"),
        np.float32(0.1),
        np.bool_(True),
        np.array([1j]),
    ],
)
def test_numpys_numbers_keep_type_and_shape(value: Any) -> None:
    (back,) = decode(encode([value]), {}.get)
    assert type(back) is type(value)
    assert back.dtype == value.dtype
    assert np.array_equal(back, value)


# ------------------------------------------------------------------------------------------- the filter

LOAD, AND, RETURN = 0x20, 0x54, 0x06
JUMPS = {0x15: lambda a, k: a == k, 0x35: lambda a, k: a >= k, 0x45: lambda a, k: bool(a & k)}
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026


def outcome(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel's machine for such programs answers to a system call."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    place, accumulator = 0, 0
    while True:
        code, then, otherwise, operand = struct.unpack_from("<HBBI", program, 8 * place)
        place += 1
        if code == RETURN:
            return int(operand)
        if code == LOAD:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == AND:
            accumulator &= operand
        else:
            place += then if JUMPS[code](accumulator, operand) else otherwise


CONDITIONS: list[tuple[str, tuple[int, ...], int]] = [
    ("ioctl", (0, 0x5401), ALLOW),
    ("ioctl", (0, 0x5412), EPERM),
    ("socketpair", (1,), ALLOW),
    ("socketpair", (2,), EPERM),
    ("sendto", (3, 4, 5, 0, 0), ALLOW),
    ("sendto", (3, 4, 5, 0, 1 << 32), EPERM),
    ("prlimit64", (0, 7, 0), ALLOW),
    ("prlimit64", (0, 7, 1), EPERM),
    ("fcntl", (0, 2), ALLOW),
    ("fcntl", (0, 1024), EPERM),
    ("fsync", (0,), 0x50000),
    ("fdatasync", (0,), 0x50000),
    ("clone", (0x3D0F00,), ALLOW),
    ("clone", (0x11,), EPERM),
    ("clone", (0x3D0B00,), EPERM),
    ("clone", (0x10010F00,), EPERM),
    ("clone3", (), ENOSYS),
]


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_allows_what_is_listed_and_nothing_else(machine: str, arch: int) -> None:
    program, numbers = build_filter(machine), ALLOWED[machine]
    conditional = {numbers[name] for name, _, _ in CONDITIONS}
    free = {*numbers.values()} - conditional
    for number in set(range(1024)) - conditional:
        assert outcome(program, arch, number) == (ALLOW if number in free else EPERM), number
    for name, arguments, expected in CONDITIONS:
        assert outcome(program, arch, numbers[name], *arguments) == expected, (name, arguments)
    assert outcome(program, arch, 0x40000000 + numbers["getpid"]) == EPERM
    assert outcome(program, 0x40000003, numbers["getpid"]) == KILL


def test_no_filter_is_made_for_unknown_machines() -> None:
    with pytest.raises(OSError, match="no system-call filter for vax"):
        build_filter("vax")
