"""The training shards, row by row, in an order that nothing but the seed, the epoch and the number of rows decides.

The rows of all shards, in the order of their records, are cut into blocks of BLOCK rows. An epoch permutes the
blocks, and the rows inside each. Rows were shuffled when the shards were written, so that is random enough, and it
buys three things: reading stays sequential, position `start` is found by arithmetic and reading one block (a resume
costs the same anywhere), and the order is the same for any number of ranks and however the shards were cut.

A rank takes positions rank, rank + world_size, ...; together the ranks see every row once. The next block is read
and decoded in a thread meanwhile. Token ids and rewards come as NumPy slices of the block's own arrays: no Python
work per token. Left out: a cache on local disk (object stores are read a block ahead), and mixing of several sets.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Any, TypedDict, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import DamagedError, StoreError
from storage.parts import PartRecord
from storage.read import open_table
from storage.store import Store

__all__ = ["BLOCK", "Row", "ShardReader"]

BLOCK = 2048
"""Rows that are read, and shuffled among themselves, at a time. Part of the order: a change is another order."""

_OPEN_FILES = 32

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Row(TypedDict):
    """One prompt with its K training completions: the columns of the `shards` table (and any that were added)."""

    prompt_id: str
    prompt_token_ids: Ints  # (T,)
    completion_token_ids: list[Ints]  # K arrays (T_k,)
    sample_index: Ints  # (K,)
    origin: list[str]  # K
    reward: Floats  # (K,)
    quantile_reward: Floats  # (K,)
    quantile_low: Floats  # (K,)
    quantile_high: Floats  # (K,)
    ref_logprob: Floats  # (K,)
    num_ref: int
    ref_mean: float | None
    ref_std: float | None


class ShardReader:
    """Rows of a list of shards in a shuffled order that can be entered anywhere.

    `columns` leaves out what is not needed (a row then has only those keys). Arrays are writable slices of a block:
    copy one to keep it longer than its block. Can be pickled; raises DamagedError where a shard is not what was
    committed.
    """

    def __init__(
        self,
        store: Store,
        records: Sequence[PartRecord],
        seed: int = 0,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.store = store
        self.records = tuple(record for record in records if record.rows)
        self.seed = seed
        self.columns = tuple(columns) if columns is not None else None
        self._starts = np.cumsum([0, *(record.rows for record in self.records)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def order(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Row numbers in the order of an epoch, from position `start` on."""
        for block, first in self._blocks(epoch, start):
            begin = block * BLOCK
            yield from (begin + self._shuffled(epoch, block)[first:]).tolist()

    def iterate(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        """This rank's rows of an epoch.

        `start` counts the rows that all ranks together have seen; this rank goes on with positions start + rank,
        start + rank + world_size, ... Where the rest does not divide by `world_size`, the first ranks get one more.
        """
        if not 0 <= rank < world_size:
            raise StoreError(f"rank {rank} of world_size {world_size}: expected 0 <= rank < world_size.")
        if start < 0:
            raise StoreError(f"start is {start}: expected a position from 0 to {len(self)}.")
        files = _OpenShards(self.store, self.records, self.columns)
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="shard-reader") as ahead:

                def read(block: int, rows: npt.NDArray[np.int64]) -> list[Row]:
                    return self._read_block(files, block, rows)

                waiting = (
                    ahead.submit(read, block, rows)
                    for block, rows in self._share(epoch, start, rank, world_size)
                )
                upcoming = list(islice(waiting, 1))
                while upcoming:
                    current = upcoming.pop()
                    rows = current.result()
                    upcoming.extend(islice(waiting, 1))
                    yield from rows
        finally:
            files.close()

    def _share(
        self, epoch: int, start: int, rank: int, world_size: int
    ) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """(block, this rank's row numbers inside it, in order) for each block that has some."""
        skip = rank
        for block, first in self._blocks(epoch, start):
            shuffled = self._shuffled(epoch, block)[first:]
            mine = shuffled[skip::world_size]
            skip = (skip - len(shuffled)) % world_size
            if len(mine):
                yield block, mine

    def _blocks(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        """(block, first position inside it) in the order of an epoch; all blocks but the last row's are full."""
        count, tail = divmod(len(self), BLOCK)
        order = self._generator(epoch, -1).permutation(count + bool(tail)).tolist()
        at, skip = divmod(start, BLOCK)
        if tail:
            short = order.index(count)
            if start >= short * BLOCK + tail:  # behind the short block: count from its end
                at, skip = divmod(start - tail, BLOCK)
                at += 1
        for block in order[at:]:
            yield block, skip
            skip = 0

    def _shuffled(self, epoch: int, block: int) -> npt.NDArray[np.int64]:
        rows = min(BLOCK, len(self) - block * BLOCK)
        return self._generator(epoch, block).permutation(rows)

    def _generator(self, epoch: int, block: int) -> np.random.Generator:
        # Philox counts from a key: the same on every platform, and made at once for any (epoch, block).
        key = np.array([np.uint64(self.seed % 2**64), np.uint64((epoch << 32) + block + 1)], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _read_block(self, files: "_OpenShards", block: int, rows: npt.NDArray[np.int64]) -> list[Row]:
        begin = block * BLOCK
        end = min(begin + BLOCK, len(self))
        part = int(np.searchsorted(self._starts, begin, side="right")) - 1
        tables = []
        while part < len(self.records) and self._starts[part] < end:
            offset = int(self._starts[part])
            stop = min(end - offset, self.records[part].rows)
            tables.append(files.read(part, max(0, begin - offset), stop))
            part += 1
        table = pa.concat_tables(tables)
        if len(rows) * 2 < table.num_rows:  # one rank of many: decode no more than its share
            table, rows = table.take(rows), np.arange(len(rows))
        names = table.column_names
        columns = [_values(table.column(name)) for name in names]
        return [
            cast(Row, dict(zip(names, [column[row] for column in columns], strict=True)))
            for row in rows.tolist()
        ]


class _OpenShards:
    """The shards being read: files stay open, and their row groups' borders known, as long as they are in use."""

    def __init__(self, store: Store, records: Sequence[PartRecord], columns: tuple[str, ...] | None) -> None:
        self._store = store
        self._records = records
        self._columns = columns
        self._open: OrderedDict[int, tuple[pq.ParquetFile, npt.NDArray[np.int64]]] = OrderedDict()

    def read(self, part: int, first: int, stop: int) -> pa.Table:
        """Rows [first, stop) of a part, by reading just the row groups that they are in."""
        opened, starts = self._opened(part)
        low = int(np.searchsorted(starts, first, side="right")) - 1
        high = int(np.searchsorted(starts, stop, side="left"))
        columns = None if self._columns is None else list(self._columns)
        try:
            table = opened.read_row_groups(list(range(low, high)), columns=columns, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise DamagedError(
                f"{self._records[part].key}: its rows cannot be decoded ({error}). "
                "`qrpo verify --repair` computes just this part again."
            ) from None
        return table.slice(first - int(starts[low]), stop - first)

    def _opened(self, part: int) -> tuple[pq.ParquetFile, npt.NDArray[np.int64]]:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        if len(self._open) >= _OPEN_FILES:
            self._open.popitem(last=False)[1][0].close(force=True)
        opened = open_table(self._store.files, self._records[part])
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        self._open[part] = opened, np.cumsum([0, *sizes], dtype=np.int64)
        return self._open[part]

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1][0].close(force=True)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values: arrays for lists of numbers, lists of arrays for lists of those, else Python values."""
    if not pa.types.is_list(column.type):
        return cast(list[Any], column.to_pylist())
    return [value for chunk in column.chunks for value in _lists(chunk)]


def _lists(array: pa.ListArray) -> list[Any]:
    if array.null_count:  # only in added columns
        return cast(list[Any], array.to_pylist())
    offsets = array.offsets.to_numpy()
    items = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    inner: Any
    if pa.types.is_list(items.type):
        inner = _lists(items)
    elif _is_number(items.type) and not items.null_count:
        inner = np.array(items.to_numpy())  # a copy, so that it is writable: torch warns of read-only memory
    else:
        inner = items.to_pylist()
    bounds = (offsets - offsets[0]).tolist()
    return [inner[start:stop] for start, stop in pairwise(bounds)]


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
