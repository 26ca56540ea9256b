"""Reads training shards row by row, in an order that depends on seed, epoch and shards only.

Shards are read in pieces of at most PIECE rows, which are row groups. An epoch permutes the pieces,
forms windows of about WINDOW rows from consecutive pieces, and permutes the rows of each window.
Rows were already shuffled inside each shard when it was written. The order has three advantages:

- Every row group is read once per epoch.
- A position is found from the shards' row counts alone, so a resume reads one window, wherever it
  is.
- It does not depend on the number of ranks: rank r reads positions r, r + world_size, ...

Threads read, decode and reorder the next window in the meantime. A batch is a slice of the window's
columns, so there is no Python work per row or token until a row is read.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.columns import ColumnBatch, concatenate, gather
from storage.errors import StoreError
from storage.parts import PartRecord
from storage.store import Store

WINDOW = 2048
"""Rows that are shuffled together, up to one piece more or less. Another value, another order."""

PIECE = 1024
"""Rows that are read together. Commit shards with `group_rows=PIECE` to decode whole groups."""

_READS = 4  # concurrent reads of pieces, which mostly wait for an object store

Row: TypeAlias = dict[str, Any]
"""One row: for each column an array, a list of arrays, or a Python value."""


class ShardReader:
    """The rows of shards in a shuffled order, from any position.

    With `columns`, rows have these keys only. Arrays are writable slices of a window: copy one to
    keep it longer. Can be pickled. Raises DamagedError where a shard is not the committed one.
    """

    def __init__(
        self, store: Store, records: Sequence[PartRecord], seed: int = 0, columns: Sequence[str] | None = None
    ) -> None:
        self.store = store
        self.records = tuple(record for record in records if record.rows)
        self.seed = seed
        self.columns = list(columns) if columns is not None else None
        rows = np.array([record.rows for record in self.records], dtype=np.int64)
        pieces = -(-rows // PIECE)
        self._part = np.repeat(np.arange(len(rows)), pieces)
        in_part = np.arange(len(self._part)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._first = in_part * PIECE
        self._rows = np.minimum(rows[self._part] - self._first, PIECE)

    def __len__(self) -> int:
        return int(self._rows.sum())

    def order(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Row numbers over all shards, in the order of an epoch, from position `start` on."""
        before = np.cumsum(self._rows) - self._rows
        for pieces, rows in self._windows(epoch, start):
            numbers = np.concatenate([before[piece] + np.arange(self._rows[piece]) for piece in pieces])
            yield from numbers[rows].tolist()

    def iterate(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        """This rank's rows of an epoch.

        `start` counts the rows that all ranks together have seen. This rank reads positions start +
        rank, start + rank + world_size, ... If the rest is not divisible, the first ranks get one
        row more.
        """
        for rows in self._read(epoch, start, rank, world_size):
            yield from rows

    def batches(
        self, size: int, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[ColumnBatch]:
        """The same rows in batches of `size`, as columns; the last batch may be smaller."""
        held: list[ColumnBatch] = []
        missing = size
        for rows in self._read(epoch, start, rank, world_size):
            at = 0
            while at < len(rows):
                part = rows[at : at + missing]
                held.append(part)
                at += len(part)
                missing -= len(part)
                if not missing:
                    yield concatenate(held)
                    held, missing = [], size
        if held:
            yield concatenate(held)

    def _read(self, epoch: int, start: int, rank: int, world_size: int) -> Iterator[ColumnBatch]:
        """This rank's rows, one batch per window, read one window ahead."""
        if not 0 <= rank < world_size:
            raise StoreError(f"rank {rank} of world_size {world_size}: expected 0 <= rank < world_size.")
        if start < 0:
            raise StoreError(f"start is {start}: expected a position from 0 to {len(self)}.")
        with (
            ThreadPoolExecutor(_READS, thread_name_prefix="shard-reader") as reads,
            ThreadPoolExecutor(1, thread_name_prefix="shard-reader-ahead") as ahead,
        ):

            def read(pieces: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> ColumnBatch:
                table = pa.concat_tables(reads.map(self._read_piece, pieces))
                columns = {name: pa.concat_arrays(table[name].chunks) for name in table.column_names}
                return ColumnBatch({name: gather(column, rows) for name, column in columns.items()})

            waiting = (ahead.submit(read, *share) for share in self._share(epoch, start, rank, world_size))
            upcoming = list(islice(waiting, 1))
            while upcoming:
                rows = upcoming.pop().result()
                upcoming.extend(islice(waiting, 1))
                yield rows

    def _share(
        self, epoch: int, start: int, rank: int, world_size: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """The pieces of each window, and the indices of this rank's rows in them, if it has
        some."""
        skip = rank
        for pieces, rows in self._windows(epoch, start):
            mine = rows[skip::world_size]
            skip = (skip - len(rows)) % world_size
            if len(mine):
                yield pieces, mine

    def _windows(
        self, epoch: int, start: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """The pieces of each window, and the indices of their rows in order, from `start` on.

        A piece belongs to the window in whose WINDOW positions it begins.
        """
        pieces = self._generator(epoch, 0).permutation(len(self._rows))
        begins = np.cumsum(self._rows[pieces]) - self._rows[pieces]
        firsts = np.flatnonzero(np.diff(begins // WINDOW, prepend=-1))
        borders = np.append(begins[firsts], len(self))
        firsts = np.append(firsts, len(pieces))
        entered = max(0, int(np.searchsorted(borders, start, side="right")) - 1)
        for window in range(entered, len(borders) - 1):
            begin, end = borders[window : window + 2]
            rows = self._generator(epoch, window + 1).permutation(end - begin)
            yield pieces[firsts[window] : firsts[window + 1]], rows[max(0, start - begin) :]

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        # Philox is counter-based: equal on every platform, ready at once for any (epoch, stream)
        key = np.array([np.uint64(self.seed % 2**64), np.uint64((epoch << 32) + stream)], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _read_piece(self, piece: int) -> pa.Table:
        record, first, rows = self.records[self._part[piece]], self._first[piece], self._rows[piece]
        return self.store.read_rows(record, int(first), int(rows), self.columns)
