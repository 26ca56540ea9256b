"""Which rows each process trains on at each step: a function of the seed, the epoch and the position, and of nothing else.

An epoch is one order of all rows. Step s takes the next `prompts_per_step` of them, whatever the number of processes,
workers or micro-batches; process `rank` of `world_size` takes every `world_size`-th of those, from its rank on. So
every row is seen exactly once an epoch, the global batch of a step is the same for any number of processes, and the
whole state of the data is one integer, the position: a resumed run, also with another number of processes, goes on
from there by one seek.

Where an epoch ends with fewer rows than processes, some have none. They still must take part in the step, for its
collective operations wait for all; they get one row that is marked `IDLE`, and count it for nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from qrpo.rows import collate_rows

__all__ = ["RowReader", "ShuffledRows", "is_idle", "step_loader"]

IDLE = "idle"


class RowReader(Protocol):
    """Streams rows in an order that is a function of the epoch alone, from any position on at once."""

    def iterate(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Rows start + rank, start + rank + world_size, ... of this epoch."""

    def __len__(self) -> int:
        """Rows in an epoch."""


class ShuffledRows:
    """Rows in memory as a `RowReader`: each epoch another permutation."""

    def __init__(self, rows: Sequence[Any], seed: int) -> None:
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def iterate(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Rows start + rank, start + rank + world_size, ... of this epoch."""
        order = np.random.default_rng([self.seed % 2**63, epoch]).permutation(len(self.rows))
        for place in order[start + rank :: world_size].tolist():
            yield self.rows[place]


def step_loader(
    reader: RowReader, batch_size: int, rank: int, world_size: int, *, drop_last: bool
) -> "StepLoader":
    """A data loader of this process's micro-batches, each of at most `batch_size` rows, in the form of `collate_rows`."""
    sampler = _Shares(len(reader), batch_size, rank, world_size, drop_last=drop_last)
    return StepLoader(_Rows(reader, rank, world_size), batch_sampler=sampler, collate_fn=collate_rows)


def is_idle(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these rows only stand in for none."""
    return IDLE in rows[0]


class StepLoader(DataLoader):  # type: ignore[misc]
    """A `DataLoader` that is told the epoch. No workers: the reader reads ahead by itself."""

    def set_epoch(self, epoch: int) -> None:
        """Read this epoch's order from the next iteration on."""
        self.batch_sampler.set_epoch(epoch)


class _Share(NamedTuple):
    """One process's part of one micro-batch: `rows` rows from the global position `start` on; `next` starts the next."""

    epoch: int
    start: int
    rows: int
    next: int


class _Shares(Sampler):  # type: ignore[misc]
    """The shares of an epoch, all that a Trainer must step over to resume: 0.1 microseconds each, and no rows read."""

    def __init__(self, rows: int, batch_size: int, rank: int, world_size: int, *, drop_last: bool) -> None:
        self._rows = rows
        self._size = batch_size * world_size
        self._rank, self._world_size = rank, world_size
        self._drop_last = drop_last
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows // self._size if self._drop_last else -(-self._rows // self._size)

    def __iter__(self) -> Iterator[_Share]:
        whole = self._size // self._world_size
        for start in range(0, len(self) * self._size, self._size):
            stop = start + self._size
            count = (
                whole if stop <= self._rows else len(range(start + self._rank, self._rows, self._world_size))
            )
            yield _Share(self._epoch, start, count, stop)


class _Rows(Dataset):  # type: ignore[misc]
    """The rows of shares; reading goes on where the last share ended, and seeks only where the next is another."""

    def __init__(self, reader: RowReader, rank: int, world_size: int) -> None:
        self._reader = reader
        self._rank, self._world_size = rank, world_size
        self._at: tuple[int, int] | None = None
        self._stream: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self._reader)

    def __getitems__(self, share: _Share) -> list[Any]:
        if not share.rows:
            return [{**next(self._reader.iterate(share.epoch, start=len(self) - 1)), IDLE: True}]
        if self._at != (share.epoch, share.start):
            ranks = {"rank": self._rank, "world_size": self._world_size} if self._world_size > 1 else {}
            self._stream = iter(self._reader.iterate(share.epoch, start=share.start, **ranks))
        rows = list(islice(self._stream, share.rows))
        self._at = (share.epoch, share.next)
        return rows
