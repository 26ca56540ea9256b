import dataclasses
import itertools
import pickle
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import storage
from qrpo.training.loader import is_idle, step_loader
from storage import PartKey, PartRecord, ShardReader, Store
from storage.columns import ColumnBatch, gather
from storage.reader import PIECE, WINDOW
from tests.support.storage import SHARDS, shards

SIZES = [1300, 1, 350, 700]
ROWS = sum(SIZES)


def commit(store: Store, sizes: Sequence[int]) -> list[PartRecord]:
    """Shards with these numbers of rows, numbered through."""
    starts = itertools.accumulate([0, *sizes])
    return [
        store.commit_part(PartKey("shards", "family", f"{first}-{rows}"), shards(rows, first), table=SHARDS)
        for first, rows in zip(starts, sizes, strict=False)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def records(store: Store) -> list[PartRecord]:
    return commit(store, SIZES)


def unread(store: Store, sizes: Iterable[int], seed: int = 0) -> ShardReader:
    """A reader of shards that were not written: the order is known without reading any."""
    return ShardReader(store, [PartRecord("shards", "family", "none", (), rows, 0) for rows in sizes], seed)


def numbers(rows: Iterable[Any]) -> list[int]:
    return [int(row["prompt_id"].removeprefix("prompt-")) for row in rows]


def together(shares: Iterable[Sequence[int]]) -> list[int]:
    """What the ranks saw, in turn."""
    return [row for rows in itertools.zip_longest(*shares) for row in rows if row is not None]


# ------------------------------------------------------------------------------------------------ the order

sizes_of_shards = st.lists(
    st.one_of(st.integers(0, 700), st.sampled_from([PIECE, PIECE + 1, WINDOW, 3 * WINDOW + 5])), max_size=8
)


@settings(deadline=None, max_examples=40)
@given(sizes=sizes_of_shards, seed=st.integers(-5, 2**64), epoch=st.integers(0, 1000), data=st.data())
def test_an_order_holds_every_row_once_and_can_be_entered_anywhere(
    store: Store, sizes: list[int], seed: int, epoch: int, data: st.DataObject
) -> None:
    reader = unread(store, sizes, seed)
    order = list(reader.order(epoch))
    assert len(reader) == sum(sizes)
    assert sorted(order) == list(range(sum(sizes)))
    assert order == list(unread(store, sizes, seed).order(epoch))
    start = data.draw(st.integers(0, sum(sizes) + 3))
    assert list(reader.order(epoch, start)) == order[start:]


def test_the_order_differs_by_seed_and_epoch(store: Store) -> None:
    orders = {
        tuple(unread(store, [1500, 1500], seed).order(epoch))
        for seed, epoch in itertools.product((0, 1, -1, 2**63), (0, 1))
    }
    assert len(orders) == 8


def test_small_shards_from_all_over_are_mixed(store: Store) -> None:
    order = np.array(list(unread(store, [256] * 400).order(0)))
    first, last = order[:256] // 256, order[-256:] // 256
    assert len(set(first.tolist())) >= 6, "eight shards make a window"
    assert np.abs(np.diff(np.unique(first))).max() > 8, "and they are not neighbours"
    assert np.corrcoef(np.arange(len(order)), order)[0, 1] < 0.2
    assert set(first.tolist()).isdisjoint(last.tolist())


@settings(deadline=None, max_examples=10)
@given(
    world_size=st.integers(1, 5),
    start=st.one_of(st.integers(0, ROWS + 2), st.sampled_from([PIECE, WINDOW, ROWS - 1])),
    size=st.sampled_from([1, 7, 64, 1000, 3000]),
    epoch=st.integers(0, 3),
)
def test_ranks_together_see_the_rest_of_an_epoch_once_in_one_order(
    store: Store, records: list[PartRecord], world_size: int, start: int, size: int, epoch: int
) -> None:
    reader = ShardReader(store, records, seed=7, columns=["prompt_id"])
    batches = [list(reader.batches(size, epoch, start, rank, world_size)) for rank in range(world_size)]
    for share in batches:
        assert [len(rows) for rows in share[:-1]] == [size] * (len(share) - 1)
    shares = [numbers(itertools.chain.from_iterable(share)) for share in batches]
    assert together(shares) == list(reader.order(epoch))[start:]
    assert numbers(reader.iterate(epoch, start, world_size - 1, world_size)) == shares[-1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_trainer_s_loader_passes_on_the_reader_s_batches(
    store: Store, records: list[PartRecord], world_size: int
) -> None:
    reader = ShardReader(store, records, seed=3, columns=["prompt_id"])
    shares = []
    for rank in range(world_size):
        copy = pickle.loads(pickle.dumps(reader))  # noqa: S301 (for a worker)
        loader = step_loader(copy, 600 // world_size, rank, world_size, drop_last=False)
        loader.set_epoch(2)
        batches = [batch["rows"] for batch in loader]
        assert all(isinstance(rows, ColumnBatch) or is_idle(rows) for rows in batches)
        shares.append(numbers(itertools.chain.from_iterable(batches)))
    assert together(shares) == list(reader.order(2))


# ------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("kind", ["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_rows_hold_what_was_committed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Files opened by path, and objects read by one request or by ranges."""
    if kind == "s3":
        store = request.getfixturevalue("s3_store")
    else:
        store = Store(tmp_path if kind == "local" else f"memory://{tmp_path.name}")
    expected = {row["prompt_id"]: row for row in shards(PIECE + 60).to_pylist()}
    seen = list(ShardReader(store, commit(store, [PIECE + 20, 40])).iterate(1))
    assert len(seen) == len(expected)
    for row in seen:
        want = expected[row["prompt_id"]]
        assert row.keys() == want.keys()
        for name, value in row.items():
            if name == "completion_token_ids":
                value = [ids.tolist() for ids in value]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == want[name]


def test_arrays_have_the_stored_types_and_can_be_written(store: Store, records: list[PartRecord]) -> None:
    row = next(ShardReader(store, records).iterate(0))
    assert row["prompt_token_ids"].dtype == np.int32
    assert all(ids.dtype == np.int32 for ids in row["completion_token_ids"])
    assert row["quantile_reward"].dtype == row["ref_logprob"].dtype == np.float32
    for array in (row["prompt_token_ids"], row["completion_token_ids"][0], row["reward"]):
        array[0] = 5
        assert array[0] == 5


def test_a_batch_is_columns_that_are_padded_at_once(store: Store, records: list[PartRecord]) -> None:
    for rows in ShardReader(store, records, seed=1).batches(900, 0):  # some are in two windows
        column = rows.columns["prompt_token_ids"]
        padded = column.padded(-1)
        assert padded.shape == (len(rows), column.lengths.max())
        for made, row in zip(padded, rows, strict=True):
            length = len(row["prompt_token_ids"])
            assert made[:length].tolist() == row["prompt_token_ids"].tolist()
            assert (made[length:] == -1).all()
        completions = rows.columns["completion_token_ids"]
        assert completions.lengths.tolist() == [len(row["completion_token_ids"]) for row in rows]
        assert rows[-1]["prompt_id"] == list(rows)[-1]["prompt_id"]
        assert rows[3:5][1]["completion_token_ids"][0].tolist() == completions[4][0].tolist()


def test_lists_of_one_length_are_padded_without_a_copy() -> None:
    column = gather(pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32())), np.array([2, 0]))
    padded = column.padded()
    assert padded.tolist() == [[5, 6], [1, 2]]
    assert np.shares_memory(padded, column.values)
    assert column[:0].padded().shape == (0, 0)
    with pytest.raises(IndexError):
        column[2]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([[1, 2, 3], [], [4]], pa.list_(pa.int64())),
        ([[], [], []], pa.list_(pa.float32())),
        ([[1, None], None, [2]], pa.list_(pa.int32())),
        ([[None, 1], [2], [3]], pa.list_(pa.int32())),
        ([[[1], []], [], [[2, 3]]], pa.list_(pa.list_(pa.int16()))),
        ([[], [], []], pa.list_(pa.list_(pa.int32()))),
        ([[2**32], [], [1]], pa.list_(pa.uint64())),
        ([["a"], [], ["b", "c"]], pa.list_(pa.string())),
        ([[True], [False], []], pa.list_(pa.bool_())),
        ([1.5, None, 2.5], pa.float64()),
    ],
)
def test_columns_of_any_kind_are_put_into_order(values: list[Any], kind: pa.DataType) -> None:
    """Also where the column is a slice of a longer one."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [plain(item) for item in value] if isinstance(value, list) else value

    order = [2, 0, 1, 0]
    for array in (pa.array(values, kind), pa.array([*values, *values], kind)[3:]):
        column = gather(array, np.array(order))
        assert [plain(value) for value in column] == [values[place] for place in order]


def test_only_the_columns_asked_for_are_read(store: Store, records: list[PartRecord]) -> None:
    row = next(ShardReader(store, records, columns=["prompt_id", "ref_logprob"]).iterate(0))
    assert set(row) == {"prompt_id", "ref_logprob"}
    with pytest.raises(storage.StoreError, match="has no column input_ids; it has prompt_id"):
        next(ShardReader(store, records, columns=["input_ids"]).iterate(0))


# ------------------------------------------------------------------------------------------- what goes wrong


def test_entering_late_reads_only_the_shards_that_follow(store: Store, records: list[PartRecord]) -> None:
    small = records[3]
    start = -(-WINDOW // small.rows) * small.rows  # where the second window begins
    wanted = {row // small.rows for row in unread(store, [small.rows] * 12).order(0, start)}
    file = dataclasses.replace(small.files[0], key=PartKey("shards", "family", "gone").table)
    gone = dataclasses.replace(small, fingerprint="gone", files=(file,))
    reader = ShardReader(store, [small if shard in wanted else gone for shard in range(12)])

    assert len(list(reader.iterate(0, start))) == 12 * small.rows - start
    with pytest.raises(storage.DamagedError, match=f"{file.key} is missing"):
        list(reader.iterate(0))


def test_a_reader_that_is_left_early_ends_its_threads(store: Store, records: list[PartRecord]) -> None:
    rows = ShardReader(store, records).iterate(0)
    next(rows)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("shard-reader")]
    rows.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-reader")]


def test_wrong_ranks_and_positions_are_refused(store: Store) -> None:
    reader = unread(store, [5])
    for rank, world_size in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(storage.StoreError, match="expected 0 <= rank < world_size"):
            next(reader.iterate(0, 0, rank, world_size))
    with pytest.raises(storage.StoreError, match="start is -1"):
        next(reader.iterate(0, -1))
