"""Values as inert data: what crosses comes out equal and plain, and what is hostile comes out as an error."""

import json
import math
from collections import Counter, OrderedDict, deque, namedtuple
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo.sandbox.inside.codec import CodecError, decode, encode
from qrpo.sandbox.inside.framing import complete_frames, frame
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


@settings(deadline=None, max_examples=150)
@given(VALUES)
def test_plain_values_come_back_equal_and_of_the_same_types(value: Any) -> None:
    back = decode(encode(value), {})
    assert back == value
    assert type(back) is type(value)


@settings(deadline=None, max_examples=100)
@given(st.lists(ATOMS))
def test_atoms_keep_their_types(values: list[Any]) -> None:
    back = decode(encode(values), {})
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
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (point(1, 2), (1, 2)),
        (type("Text", (str,), {})("x"), "x"),
        (type("Real", (float,), {})(-0.0), -0.0),
        (bytearray(b"x"), b"x"),
    ]:
        back = decode(encode(value), {})
        assert type(back) is type(plain)
        assert back == plain
    assert math.copysign(1, decode(encode(type("Real", (float,), {})(-0.0)), {})) == -1


def test_shared_parts_cycles_and_long_chains_survive() -> None:
    shared: list[Any] = [1]
    shared.append(shared)
    first, second = decode(encode([shared, shared]), {})
    assert first is second
    assert first[1] is first
    chain = None
    for value in range(50_000):
        chain = Node(value, chain)
    back = decode(encode(chain), {"Node": Node})
    count = 0
    while back is not None:
        count, back = count + 1, back.next
    assert count == 50_000


@pytest.mark.parametrize(
    "value", [len, print, iter([1]), (n for n in [1]), object(), int, json, lambda: 1, range(3)]
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
        b"9" * 10_000,
    ],
)
def test_hostile_data_is_an_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data, {"Node": Node, "len": len})


def test_messages_are_cut_at_the_first_that_is_not_whole() -> None:
    stream = frame(b"one") + frame(b"") + frame(b"three")
    for length in range(len(stream)):
        frames = complete_frames(stream[:length], 10)
        assert frames == [b"one", b"", b"three"][: len(frames)]
    assert complete_frames(stream, 10) == [b"one", b"", b"three"]
    assert complete_frames(stream, 2) == [b"one", b""]


def test_the_filter_is_made_for_machines_whose_numbers_are_known() -> None:
    for machine, numbers in ALLOWED.items():
        program = build_filter(machine)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096  # the kernel's limit
        assert len(set(numbers.values())) == len(numbers)
        assert not {"fork", "execve", "ptrace", "mount", "unshare", "socket", "connect", "bpf"} & set(numbers)
    with pytest.raises(OSError, match="no system-call filter for vax"):
        build_filter("vax")
