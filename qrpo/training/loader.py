"""The rows that each process trains on at each step: a function of the seed, the epoch and the
position only.

An epoch is one order of all rows. Step s takes the next `prompts_per_step` of them, for any number
of processes or micro-batches; process `rank` of `world_size` takes every `world_size`-th of those,
starting at its rank. So every row is seen once an epoch, the global batch of a step does not depend
on the number of processes, and the state of the data is one integer, the position. A resumed run,
also with another number of processes, continues there after one seek.

If an epoch ends with fewer rows than processes, some processes have none. They must still take part
in the step, because its collective operations wait for all. They get one row marked `IDLE`, which
has weight 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, repeat
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from qrpo.seeds import seeded_hash
from qrpo.training.rows import collate_rows

IDLE = "idle"


class RowReader(Protocol):
    """Streams rows in an order that depends on the epoch alone, starting at any position without
    reading what comes before.

    A reader that stores columns also has `batches(size, epoch, start, rank, world_size)`: the same
    rows in sequences of `size`, which are passed on unchanged.
    """

    def iterate(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Rows start + rank, start + rank + world_size, ... of this epoch."""

    def __len__(self) -> int:
        """Rows in an epoch."""


class ShuffledRows:
    """Rows in memory as a `RowReader`, in another permutation each epoch."""

    def __init__(self, rows: Sequence[Any], seed: int) -> None:
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def iterate(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Rows start + rank, start + rank + world_size, ... of this epoch."""
        order = np.random.default_rng([self.seed % 2**63, epoch]).permutation(len(self.rows))
        for index in order[start + rank :: world_size].tolist():
            yield self.rows[index]


def held_out(prompt_id: str, fraction: float, seed: int) -> bool:
    """Whether the prompt is held out of training for `eval_loss`: a hash of its id and the seed
    against `fraction`."""
    return int.from_bytes(seeded_hash("held out", seed, prompt_id)[:8]) < fraction * 2**64


def step_loader(
    reader: RowReader, batch_size: int, rank: int, world_size: int, *, drop_last: bool
) -> "StepLoader":
    """A data loader of this process's micro-batches of at most `batch_size` collated rows; `reader`
    may also be an iterable dataset."""
    if isinstance(reader, IterableDataset):
        share = _RankShare(reader, batch_size, rank, world_size, drop_last)
        return StepLoader(share, batch_size=None, collate_fn=collate_rows)
    shared = batch_size * world_size
    count = len(reader) // shared if drop_last else -(-len(reader) // shared)
    return StepLoader(
        _MicroBatchDataset(reader, batch_size, rank, world_size),
        batch_sampler=_MicroBatchSampler(count),
        collate_fn=collate_rows,
    )


def is_idle(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these rows stand for none."""
    return IDLE in rows[0]


class StepLoader(DataLoader):  # type: ignore[misc]
    """A `DataLoader` with `set_epoch`. It has no workers: the reader reads ahead itself."""

    def set_epoch(self, epoch: int) -> None:
        """Read this epoch's order from the next iteration on."""
        (self.batch_sampler or self.dataset).set_epoch(epoch)


class _RankShare(IterableDataset):  # type: ignore[misc]
    """One process's micro-batches of an iterable dataset, which is read in its own order."""

    def __init__(self, rows: Any, batch_size: int, rank: int, world_size: int, drop_last: bool) -> None:
        self._rows, self._drop_last = rows, drop_last
        self._shared, self._rank, self._world_size = batch_size * world_size, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)

    def __len__(self) -> int:
        count = len(self._rows)
        return count // self._shared if self._drop_last else -(-count // self._shared)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        rows = iter(self._rows)
        while batch := list(islice(rows, self._shared)):
            if len(batch) == self._shared or not self._drop_last:
                yield batch[self._rank :: self._world_size] or [{**batch[-1], IDLE: True}]


class _MicroBatchSampler(Sampler):  # type: ignore[misc]
    """(epoch, number) of each micro-batch. A resumed Trainer skips these, 0.07 microseconds each,
    and reads no rows."""

    def __init__(self, batches: int) -> None:
        self._batches, self._epoch = batches, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(repeat(self._epoch), range(self._batches), strict=False)


class _MicroBatchDataset(Dataset):  # type: ignore[misc]
    """One process's rows of a micro-batch by its number. It reads on after the last one and seeks
    only for another number."""

    def __init__(self, reader: RowReader, batch_size: int, rank: int, world_size: int) -> None:
        self._reader = reader
        self._size, self._rank, self._shared = batch_size, rank, batch_size * world_size
        self._ranks = {"rank": rank, "world_size": world_size} if world_size > 1 else {}
        self._next: tuple[int, int] | None = None
        self._batches: Iterator[Sequence[Any]] = iter(())

    def __len__(self) -> int:
        return len(self._reader)

    def __getitems__(self, wanted: tuple[int, int]) -> Sequence[Any]:
        epoch, number = wanted
        start = number * self._shared
        if start + self._rank >= len(self):
            return [{**next(self._reader.iterate(epoch, start=len(self) - 1)), IDLE: True}]
        if wanted != self._next:
            self._batches = self._read(epoch, start)
        self._next = epoch, number + 1
        return next(self._batches, ())

    def _read(self, epoch: int, start: int) -> Iterator[Sequence[Any]]:
        if hasattr(self._reader, "batches"):
            return iter(self._reader.batches(self._size, epoch, start=start, **self._ranks))
        rows = iter(self._reader.iterate(epoch, start=start, **self._ranks))
        return iter(lambda: list(islice(rows, self._size)), [])
