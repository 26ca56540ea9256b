import hashlib
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import row_digest
from tests.support.storage import shards

ROWS = [
    {
        "id": "a",
        "score": 0.5,
        "tokens": [1, 2],
        "nested": [[1], []],
        "part": {"x": 1, "y": None},
        "flag": True,
    },
    {"id": "", "score": None, "tokens": [], "nested": [[]], "part": {"x": 2, "y": "ä"}, "flag": False},
    {"id": None, "score": float("nan"), "tokens": None, "nested": [], "part": None, "flag": None},
    {
        "id": "b",
        "score": float("-inf"),
        "tokens": [3, None],
        "nested": [None],
        "part": {"x": None, "y": ""},
        "flag": True,
    },
]
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "score": pa.float32(),
        "tokens": pa.list_(pa.int32()),
        "nested": pa.list_(pa.list_(pa.int32())),
        "part": pa.struct({"x": pa.int64(), "y": pa.string()}),
        "flag": pa.bool_(),
    }
)
TABLE = pa.Table.from_pylist(ROWS, SCHEMA)


def changed(row: int, name: str, value: Any) -> pa.Table:
    return pa.Table.from_pylist(
        [{**old, name: value} if n == row else old for n, old in enumerate(ROWS)], SCHEMA
    )


def test_the_digest_is_that_of_the_documented_bytes() -> None:
    table = pa.table({"b": pa.array([[1, None]], pa.list_(pa.int32())), "a": ["ä"]})
    kinds = hashlib.sha256(b"1:a<text>1:b<list <int32>>").digest()
    text = b"\x01" + struct.pack("<q", 2) + "ä".encode()
    items = b"\x01" + struct.pack("<q", 2) + b"\x01" + struct.pack("<i", 1) + b"\x00" + bytes(4)
    assert row_digest(table) == int.from_bytes(hashlib.sha256(kinds + text + items).digest(), "little")


def test_a_new_version_of_a_library_changes_no_digest() -> None:
    assert f"{row_digest(TABLE):064x}" == "38c75fcdcfd15e6b7bf78f5f2645999bd165e5f9906f7522400346ed882e0758"


@given(st.permutations(range(12)), st.integers(0, 12))
def test_the_order_of_rows_and_the_cut_into_parts_do_not_matter(order: list[int], cut: int) -> None:
    table = pa.concat_tables([TABLE] * 3)
    permuted = table.take(order)
    assert row_digest(permuted) == row_digest(table)
    parts = row_digest(permuted.slice(0, cut)) + row_digest(permuted.slice(cut))
    assert parts % 2**256 == row_digest(table)


def test_every_row_counts_as_often_as_it_is_there() -> None:
    once = row_digest(TABLE)
    assert row_digest(pa.concat_tables([TABLE, TABLE])) == 2 * once % 2**256
    assert len({row_digest(TABLE.slice(row, 1)) for row in range(4)}) == 4
    assert row_digest(TABLE.slice(0, 0)) == 0


@pytest.mark.parametrize("table", [pa.table({"x": np.arange(40_000)}), shards(50)], ids=["long", "shards"])
def test_a_table_is_the_sum_of_its_rows(table: pa.Table) -> None:
    cut = table.num_rows // 3
    halves = row_digest(table.slice(0, cut)) + row_digest(table.slice(cut))
    assert row_digest(table) == halves % 2**256


def test_column_order_and_excluded_columns_do_not_matter() -> None:
    assert row_digest(TABLE.select(list(reversed(TABLE.column_names)))) == row_digest(TABLE)
    assert row_digest(TABLE, exclude=["score", "not there"]) == row_digest(TABLE.drop_columns("score"))
    assert row_digest(TABLE, exclude=["score"]) != row_digest(TABLE)
    swapped = pa.table({"a": [1], "b": [2]})
    assert row_digest(swapped) != row_digest(swapped.rename_columns(["b", "a"]))


def test_encodings_and_chunks_do_not_matter() -> None:
    large = {"id": pa.large_string(), "tokens": pa.large_list(pa.int32())}
    large |= {"nested": pa.large_list(pa.large_list(pa.int32()))}
    large |= {"part": pa.struct({"x": pa.int64(), "y": pa.large_string()})}
    other = TABLE.cast(pa.schema({field.name: large.get(field.name, field.type) for field in SCHEMA}))
    assert row_digest(other) == row_digest(TABLE)
    assert row_digest(TABLE.set_column(0, "id", TABLE["id"].dictionary_encode())) == row_digest(TABLE)
    assert row_digest(pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])) == row_digest(TABLE)
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2))
    assert row_digest(pa.table({"x": fixed.slice(1)})) == row_digest(
        pa.table({"x": pa.array([None, [3, 4]], pa.list_(pa.int32()))})
    )
    dates = pa.array([1, None], pa.date32())
    assert row_digest(pa.table({"x": dates})) != row_digest(pa.table({"x": dates.cast(pa.int32())}))


@pytest.mark.parametrize(
    ("row", "name", "value"),
    [
        (0, "score", np.nextafter(np.float32(0.5), np.float32(1))),
        (1, "score", 0.0),
        (2, "score", float("inf")),
        (3, "score", float("inf")),
        (0, "id", "A"),
        (1, "id", None),
        (0, "tokens", [1, 3]),
        (0, "tokens", [1]),
        (1, "tokens", None),
        (3, "tokens", [3, 0]),
        (0, "nested", [[], [1]]),
        (2, "nested", [[]]),
        (3, "nested", [[]]),
        (0, "part", {"x": 1, "y": ""}),
        (2, "part", {"x": None, "y": None}),
        (1, "flag", None),
    ],
)
def test_one_changed_value_changes_the_digest(row: int, name: str, value: Any) -> None:
    assert row_digest(changed(row, name, value)) != row_digest(TABLE)


def test_floats_are_compared_bit_by_bit() -> None:
    def digest(bits: int) -> int:
        return row_digest(pa.table({"x": np.array([bits], np.uint32).view(np.float32)}))

    assert digest(0) != digest(1 << 31)  # 0.0 and -0.0
    assert digest(0x7FC00000) != digest(0x7FC00001)  # two NaNs
    assert digest(0x7FC00000) == digest(0x7FC00000)


def test_what_lies_under_a_null_does_not_matter() -> None:
    values = np.array([1.0, 2.0], np.float32)
    hidden = pa.array(values, mask=np.array([False, True]))
    assert row_digest(pa.table({"x": hidden})) == row_digest(
        pa.table({"x": pa.array([1.0, None], pa.float32())})
    )


def test_text_that_moves_between_columns_changes_the_digest() -> None:
    assert row_digest(pa.table({"a": ["xy"], "b": ["z"]})) != row_digest(pa.table({"a": ["x"], "b": ["yz"]}))
    one, two = ([[[1], [2]], [[1, 2]]][n] for n in (0, 1))
    kind = pa.list_(pa.list_(pa.int8()))
    assert row_digest(pa.table({"a": pa.array([one], kind)})) != row_digest(
        pa.table({"a": pa.array([two], kind)})
    )


def test_a_type_without_a_definition_is_refused() -> None:
    with pytest.raises(TypeError, match="map"):
        row_digest(pa.table({"x": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32()))}))
