"""An artifact's rows, read by row group: a question opens the parts that it needs and decodes the columns it names.

Everything goes through `storage.read.open_table`, so it works the same on every store, and a damaged part is told.
Rows are numbered from 0 through the parts in the manifest's order; that number is a row's position.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from qrpo.errors import DataError
from storage import Manifest, PartRecord, Store
from storage.read import open_table

__all__ = ["Chunk", "Group", "Rows", "rows_of"]

_BATCH = 1024  # rows decoded at a time where only some of a row group are wanted
_SPAN_ROWS, _SPAN_BYTES = 131_072, 64 << 20  # looked at together


@dataclass(frozen=True)
class Group:
    """One row group: the part's number, the group's number in the part, the position of its first row, its rows."""

    part: int
    number: int
    start: int
    rows: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows from position `start` on."""

    start: int
    frame: pl.DataFrame


class Rows:
    """The rows of some parts. `records` must all hold tables."""

    def __init__(self, store: Store, records: Sequence[PartRecord]) -> None:
        self.store = store
        self.records = [record for record in records if record.table is not None]
        self.starts = [0, *accumulate(record.rows for record in self.records)]
        self._footers: dict[int, pq.FileMetaData] = {}

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def schema(self) -> pl.Schema:
        """Columns and types, from the first part."""
        return pl.Schema(self.arrow_schema)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """The same in Arrow's terms, with what may be null."""
        with self._open(0) as opened:
            return opened.schema_arrow

    def check_columns(self, columns: Sequence[str]) -> list[str]:
        """The columns if they are there; raises DataError with what there is."""
        unknown = [name for name in columns if name not in self.schema]
        if unknown:
            raise DataError(f"no column {', '.join(unknown)}; the columns are {', '.join(self.schema)}")
        return list(columns)

    def footer(self, part: int) -> pq.FileMetaData:
        """A part's Parquet metadata, read once."""
        if part not in self._footers:
            self._open(part).close()
        return self._footers[part]

    def groups(self, part: int) -> list[Group]:
        """The row groups of a part."""
        footer = self.footer(part)
        sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        starts = accumulate(sizes, initial=self.starts[part])
        return [
            Group(part, number, start, size)
            for number, (start, size) in enumerate(zip(starts, sizes, strict=False))
        ]

    def read(self, groups: Sequence[Group], columns: Sequence[str]) -> pl.DataFrame:
        """Some row groups of one part."""
        with self._open(groups[0].part) as opened:
            return _frame(
                opened.read_row_groups([group.number for group in groups], columns=list(columns)), columns
            )

    def scan(self, columns: Sequence[str]) -> Iterator[Chunk]:
        """All rows, many at a time: small parts are put together, big ones come in pieces."""
        held: list[pl.DataFrame] = []
        start = rows = size = 0
        for part in range(len(self.records)):
            with self._open(part) as opened:
                for group in self.groups(part):
                    held.append(_frame(opened.read_row_group(group.number, columns=list(columns)), columns))
                    rows += group.rows
                    size += int(held[-1].estimated_size())
                    if rows >= _SPAN_ROWS or size >= _SPAN_BYTES:
                        yield Chunk(start, pl.concat(held))
                        start, rows, size, held = start + rows, 0, 0, []
        if rows:
            yield Chunk(start, pl.concat(held))

    def take(self, positions: Sequence[int], columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rows at these positions, in that order."""
        columns = list(self.schema) if columns is None else list(columns)
        if not positions:
            return pl.DataFrame(schema={name: self.schema[name] for name in columns})
        by_part: dict[int, list[int]] = {}
        for position in sorted(set(positions)):
            by_part.setdefault(self._part_of(position), []).append(position)
        frames: list[pl.DataFrame] = []
        for part, wanted in by_part.items():
            with self._open(part) as opened:
                for group in self.groups(part):
                    inside = [p for p in wanted if group.start <= p < group.start + group.rows]
                    frames += _pick(opened, group, inside, columns)
        place = {position: row for row, position in enumerate(sorted(set(positions)))}
        return pl.concat(frames)[[place[position] for position in positions]]

    def place(self, position: int) -> tuple[PartRecord, int]:
        """The part of a position, and the row's number in it."""
        part = self._part_of(position)
        return self.records[part], position - self.starts[part]

    def _part_of(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise DataError(f"there is no row {position}: rows are numbered from 0 to {len(self) - 1}")
        return bisect_right(self.starts, position) - 1

    def _open(self, part: int) -> pq.ParquetFile:
        opened = open_table(self.store.files, self.records[part], sparse=True)
        self._footers.setdefault(part, opened.metadata)
        return opened


def rows_of(store: Store, manifest: Manifest) -> Rows | None:
    """The artifact's rows; None where it holds a folder (a model) or nothing."""
    rows = Rows(store, manifest.parts)
    return rows if rows.records else None


def _pick(
    opened: pq.ParquetFile, group: Group, positions: Sequence[int], columns: Sequence[str]
) -> Iterator[pl.DataFrame]:
    """The rows of a row group at these ascending positions; decodes no further than the last one."""
    if not positions:
        return
    at, done = group.start, 0
    for batch in opened.iter_batches(batch_size=_BATCH, row_groups=[group.number], columns=list(columns)):
        stop = bisect_left(positions, at + batch.num_rows)
        if stop > done:
            inside = [position - at for position in positions[done:stop]]
            yield _frame(pa.Table.from_batches([batch]), columns)[inside]
        at, done = at + batch.num_rows, stop
        if done == len(positions):
            return


def _frame(table: Any, columns: Sequence[str]) -> pl.DataFrame:
    return cast(pl.DataFrame, pl.from_arrow(table.select(list(columns))))
