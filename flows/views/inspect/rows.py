"""An artifact's rows: read some, and find those that a query asks for.

Rows are numbered from 0 through the parts in the manifest's order; that number is a row's position.
The store reads the parts, so every kind of store works and a damaged part raises an error. Only the
columns that decide are read to find rows, a few row groups at a time. So memory is bounded, a time
limit holds, and an early answer costs little.
"""

import random
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate
from operator import or_
from typing import Any, cast

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from flows.views.inspect.filters import apply_condition, parse_condition
from qrpo.errors import DataError
from storage import PartRecord, Store

_POSITION = "\0position"
_CHUNK_ROWS, _CHUNK_BYTES = 131_072, 64 << 20  # filtered at a time
_PIECE_ROWS = 4_096  # of a part, decoded at a time for single rows


class ArtifactRows:
    """The rows of some parts. Parts that hold a folder instead of a table are skipped."""

    def __init__(self, store: Store, parts: Sequence[PartRecord]) -> None:
        self.store = store
        self.parts = [part for part in parts if part.table is not None]
        self.starts = [0, *accumulate(part.rows for part in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def schema(self) -> pl.Schema:
        """Columns and types, from the first part."""
        return pl.Schema(self.arrow_schema)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema, which says what may be null."""
        return self.store.footer(self.parts[0]).schema.to_arrow_schema()

    @cached_property
    def footers(self) -> list[pq.FileMetaData]:
        """The Parquet metadata of every part."""
        return [self.store.footer(part) for part in self.parts]

    def check_columns(self, columns: Sequence[str]) -> list[str]:
        """The columns. Raises DataError if one is unknown."""
        unknown = [name for name in columns if name not in self.schema]
        if unknown:
            raise DataError(f"no column {', '.join(unknown)}; the columns are {', '.join(self.schema)}")
        return list(columns)

    def chosen(self, query: "Query") -> list[str]:
        """The columns that the query asks for."""
        return self.check_columns(query.columns or list(self.schema))

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, pl.DataFrame]]:
        """(position of the first row, rows) of all rows in chunks of several row groups."""
        schema = {name: self.schema[name] for name in columns}
        held: list[pl.DataFrame] = []
        start = rows = size = 0
        for part in self.parts:
            for table in self.store.read_groups(part, self._present(part, columns)):
                held.append(_frame(table, schema))
                rows += held[-1].height
                size += int(held[-1].estimated_size())
                if rows >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
                    yield start, pl.concat(held)
                    start, rows, size, held = start + rows, 0, 0, []
        if rows:
            yield start, pl.concat(held)

    def take(self, positions: Sequence[int], columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rows at these positions, in that order."""
        columns = list(columns or self.schema)
        ordered = sorted(set(positions))
        pieces: dict[tuple[int, int], list[int]] = {}  # (part, piece of the part) -> rows of the part
        for number, row in map(self.location, ordered):
            pieces.setdefault((number, row // _PIECE_ROWS), []).append(row)
        schema = {name: self.schema[name] for name in columns}
        frames = [pl.DataFrame(schema=schema)]
        for (number, _), wanted in pieces.items():
            first, count = wanted[0], wanted[-1] - wanted[0] + 1
            part = self.parts[number]
            table = self.store.read_rows(part, first, count, self._present(part, columns))
            frames.append(_frame(table, schema).select(pl.all().gather([row - first for row in wanted])))
        row_of = {position: row for row, position in enumerate(ordered)}
        return pl.concat(frames).select(pl.all().gather([row_of[position] for position in positions]))

    def location(self, position: int) -> tuple[int, int]:
        """The number of a position's part, and of its row in that part."""
        if not 0 <= position < len(self):
            raise DataError(f"there is no row {position}: rows are numbered from 0 to {len(self) - 1}")
        number = bisect_right(self.starts, position) - 1
        return number, position - self.starts[number]

    def _present(self, part: PartRecord, columns: Sequence[str]) -> list[str]:
        """The columns that this part has: an earlier version wrote fewer."""
        names = self.store.footer(part).schema.to_arrow_schema().names
        return [name for name in columns if name in names]


@dataclass(frozen=True)
class Query:
    """SQL condition, text to search for, column to sort by (with a minus: descending), seed of a
    random sample, and which columns and how many rows to return (None: all)."""

    where: str | None = None
    search: str | None = None
    sort: str | None = None
    sample: int | None = None
    columns: Sequence[str] | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Found:
    """Positions in order. `matches` is None if time ended before all rows were searched; `searched`
    counts those rows."""

    positions: Sequence[int]
    matches: int | None
    searched: int


def condition_of(rows: ArtifactRows, query: Query) -> pl.Expr | None:
    """Condition and search as one expression. None if the query has neither."""
    condition = parse_condition(query.where, rows.schema) if query.where else None
    if not query.search:
        return condition
    columns = [_contains(pl.col(name), kind, query.search.lower()) for name, kind in rows.schema.items()]
    found = reduce(or_, [column for column in columns if column is not None], pl.lit(False))
    return found if condition is None else condition & found


def find_rows(
    rows: ArtifactRows, query: Query, *, offset: int = 0, seconds: float = 30.0, count_seconds: float = 5.0
) -> Found:
    """The positions of the matches from number `offset` on.

    The search ends after `seconds`; counting matches past the limit ends after `count_seconds`.
    """
    column, descending = (query.sort or "").removeprefix("-"), (query.sort or "").startswith("-")
    if query.sort and rows.schema[rows.check_columns([column])[0]].is_nested():
        raise DataError(f"rows cannot be sorted by {column}, which is {rows.schema[column]}")
    condition = condition_of(rows, query)

    def ordered(hits: pl.DataFrame) -> pl.DataFrame:
        if not query.sort:
            return hits
        if hits[column].dtype.is_float():
            hits = hits.with_columns(pl.col(column).fill_nan(None))
        return hits.sort(column, descending=descending, nulls_last=True, maintain_order=True)

    if query.sample is not None:
        everything = find_rows(rows, Query(query.where, query.search), seconds=seconds)
        population = everything.positions
        size = len(population) if query.limit is None else min(query.limit, len(population))
        drawn: Sequence[int] = sorted(random.Random(query.sample).sample(population, size))
        if query.sort:
            hits = rows.take(drawn, [column]).with_columns(pl.Series(_POSITION, drawn, dtype=pl.Int64))
            drawn = ordered(hits)[_POSITION].to_list()
        return Found(drawn, everything.matches, everything.searched)
    page = slice(offset, None if query.limit is None else offset + query.limit)
    if condition is None and not query.sort:
        return Found(range(len(rows))[page], len(rows), len(rows))

    roots = condition.meta.root_names() if condition is not None else []
    kept = [column] if query.sort else []
    needed = list(dict.fromkeys([*kept, *roots])) or [next(iter(rows.schema))]
    started, matches, searched = time.monotonic(), 0, 0
    hits = pl.DataFrame(schema={_POSITION: pl.UInt32, **{name: rows.schema[name] for name in kept}})
    for start, frame in rows.scan(needed):
        matching = frame.with_row_index(_POSITION, start)
        if condition is not None:
            matching = apply_condition(matching, condition)
        searched, matches = searched + frame.height, matches + matching.height
        hits = pl.concat([hits, matching.select(hits.columns)])
        if page.stop is not None:  # keep no more than can be returned
            hits = ordered(hits).head(page.stop)
        enough = page.stop is not None and matches >= page.stop and not query.sort
        if time.monotonic() - started > (min(seconds, count_seconds) if enough else seconds):
            break
    positions = ordered(hits)[_POSITION].to_list()
    return Found(positions[page], matches if searched == len(rows) else None, searched)


def _contains(column: pl.Expr, kind: Any, text: str) -> pl.Expr | None:
    """Whether a text, or a text inside lists and structs, contains `text` in any case. None for a
    type without texts."""
    if kind == pl.String:
        return column.str.to_lowercase().str.contains(text, literal=True).fill_null(False)
    if isinstance(kind, pl.Struct):
        fields = [_contains(column.struct.field(field.name), field.dtype, text) for field in kind.fields]
        found = [field for field in fields if field is not None]
        return reduce(or_, found) if found else None
    if isinstance(kind, pl.List):
        element = _contains(pl.element(), kind.inner, text)
        return None if element is None else column.list.eval(element).list.any().fill_null(False)
    return None


def _frame(table: pa.Table, schema: Mapping[str, Any]) -> pl.DataFrame:
    """The columns of `schema`; null where a part of an earlier version lacks one."""
    for name, kind in schema.items():
        if name not in table.column_names:
            table = table.append_column(name, pl.Series([None] * table.num_rows, dtype=kind).to_arrow())
    return cast(pl.DataFrame, pl.from_arrow(table.select(list(schema))))
