import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import storage
from storage import PartKey, PartRecord, ShardReader, Store
from storage.reader import BLOCK

Table = Callable[..., pa.Table]
Commit = Callable[[list[int]], list[PartRecord]]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder and a bucket: files opened by path, and objects read whole."""
    return Store(tmp_path) if request.param == "local" else request.getfixturevalue("s3_store")


@pytest.fixture
def committed(store: Store, shards_table: Table) -> Commit:
    """committed([300, 300]): shards with so many rows each."""

    def make(sizes: list[int]) -> list[PartRecord]:
        starts = itertools.accumulate([0, *sizes])
        return [
            store.commit_part(PartKey("shards", "family", f"{first}-{rows}"), shards_table(rows, first))
            for first, rows in zip(starts, sizes, strict=False)
        ]

    return make


def numbers(rows) -> list[int]:
    return [int(row["prompt_id"].removeprefix("prompt-")) for row in rows]


@pytest.mark.parametrize("sizes", [[1], [BLOCK], [BLOCK, BLOCK], [300] * 11, [2500, 1, 700], [BLOCK * 3 + 5]])
def test_an_epoch_holds_every_row_once(store: Store, committed: Commit, sizes: list[int]) -> None:
    reader = ShardReader(store, committed(sizes), seed=3)
    assert len(reader) == sum(sizes)
    seen = numbers(reader.iterate(0))
    assert sorted(seen) == list(range(sum(sizes)))
    assert seen == list(reader.order(0))


def test_rows_hold_what_was_committed(store: Store, committed: Commit, shards_table: Table) -> None:
    records = committed([700, 500])
    expected = {row["prompt_id"]: row for row in shards_table(1200).to_pylist()}
    for row in ShardReader(store, records).iterate(1):
        want = expected[row["prompt_id"]]
        assert row.keys() == want.keys()
        assert row["prompt_token_ids"].tolist() == want["prompt_token_ids"]
        assert [ids.tolist() for ids in row["completion_token_ids"]] == want["completion_token_ids"]
        for name in (
            "sample_index",
            "reward",
            "quantile_reward",
            "quantile_low",
            "quantile_high",
            "ref_logprob",
        ):
            assert row[name].tolist() == want[name]
        assert row["origin"] == want["origin"]
        assert (row["num_ref"], row["ref_mean"], row["ref_std"]) == (10, 0.5, None)


def test_arrays_have_the_stored_types_and_can_be_written(store: Store, committed: Commit) -> None:
    row = next(ShardReader(store, committed([10])).iterate(0))
    assert row["prompt_token_ids"].dtype == np.int32
    assert all(ids.dtype == np.int32 for ids in row["completion_token_ids"])
    assert row["quantile_reward"].dtype == row["ref_logprob"].dtype == np.float32
    assert row["prompt_token_ids"].flags.writeable
    assert row["completion_token_ids"][0].flags.writeable


def test_the_order_does_not_depend_on_how_shards_were_cut(store: Store, committed: Commit) -> None:
    orders = [
        numbers(ShardReader(store, committed(sizes), seed=5).iterate(2))
        for sizes in ([3000], [70] * 42 + [60])
    ]
    assert orders[0] == orders[1]


def test_the_order_differs_by_seed_and_epoch_and_repeats_for_both(store: Store, committed: Commit) -> None:
    records = committed([1500, 1500])
    orders = {
        (seed, epoch): tuple(ShardReader(store, records, seed=seed).order(epoch))
        for seed, epoch in itertools.product((0, 1, -1, 2**63), (0, 1))
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(ShardReader(store, records, seed=1).order(1)) == orders[1, 1]


def test_ranks_together_see_the_rest_of_an_epoch_once_in_one_order(store: Store, committed: Commit) -> None:
    reader = ShardReader(store, committed([900, 1300, 450]), seed=7)
    for world_size, start in itertools.product((1, 2, 3, 8), (0, 5, 1023, 1024, 2500)):
        shares = [numbers(reader.iterate(0, start, rank, world_size)) for rank in range(world_size)]
        together = [row for rows in itertools.zip_longest(*shares) for row in rows if row is not None]
        assert together == list(reader.order(0))[start:]


def test_any_position_can_be_entered(store: Store, committed: Commit) -> None:
    reader = ShardReader(store, committed([2600, 550]), seed=11)
    for epoch in range(4):  # the short block comes at another place in each
        whole = list(reader.order(epoch))
        for start in range(0, len(whole) + 1, 37):
            assert list(reader.order(epoch, start)) == whole[start:]
    assert list(reader.order(0, len(reader) + 5)) == []


def test_entering_late_reads_only_the_shards_that_follow(store: Store, committed: Commit) -> None:
    records = committed([BLOCK] * 8)
    reader = ShardReader(store, records, seed=1)
    wanted = {row // BLOCK for row in reader.order(0, 7 * BLOCK + 3)}
    assert len(wanted) == 1
    for number, record in enumerate(records):
        if number not in wanted:
            store.delete(record.key.table)
    assert len(list(reader.iterate(0, 7 * BLOCK + 3))) == BLOCK - 3


def test_only_the_columns_asked_for_are_read(store: Store, committed: Commit) -> None:
    rows = list(ShardReader(store, committed([20]), columns=["prompt_id", "ref_logprob"]).iterate(0))
    assert set(rows[0]) == {"prompt_id", "ref_logprob"}


def test_a_damaged_shard_is_named_when_it_is_reached(store: Store, committed: Commit) -> None:
    records = committed([100, 100])
    store.delete(records[1].key.table)
    with pytest.raises(storage.DamagedError, match=records[1].key.table):
        list(ShardReader(store, records).iterate(0))


def test_a_reader_that_is_left_early_closes_its_thread_and_files(store: Store, committed: Commit) -> None:
    import threading

    rows = ShardReader(store, committed([3000])).iterate(0)
    next(rows)
    rows.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-reader")]


def test_a_reader_can_be_sent_to_a_worker(store: Store, committed: Commit) -> None:
    reader = ShardReader(store, committed([50]), seed=2)
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert numbers(copy.iterate(0)) == numbers(reader.iterate(0))


def test_wrong_ranks_are_refused(store: Store, committed: Commit) -> None:
    reader = ShardReader(store, committed([5]))
    for rank, world_size in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(storage.StoreError, match="expected 0 <= rank < world_size"):
            next(reader.iterate(0, 0, rank, world_size))
