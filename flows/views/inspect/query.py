"""Which rows: a condition, a search, an order, a sample, a page of them. The answer is positions; rows are read afterwards.

Only the columns that decide are read to find them, a few row groups at a time, so a limit on time holds and an early
answer costs little.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import polars as pl

from flows.views.inspect.filters import apply_condition, parse_condition
from flows.views.inspect.rows import Rows
from qrpo.errors import DataError

__all__ = ["Found", "Query", "condition_of", "find_rows"]

_POSITION = "\0position"


@dataclass(frozen=True)
class Query:
    """What is asked: SQL condition, text to search for, column to sort by (descending with a minus), seed of a sample."""

    where: str | None = None
    search: str | None = None
    sort: str | None = None
    sample: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether every row is meant."""
        return not self.where and not self.search


@dataclass(frozen=True)
class Found:
    """Positions in order. `matches` is None where not all rows were looked at; `searched` says how many were."""

    positions: list[int]
    matches: int | None
    searched: int


def condition_of(rows: Rows, query: Query) -> pl.Expr | None:
    """Condition and search as one expression; None where there is neither."""
    wanted = []
    if query.where:
        wanted.append(parse_condition(query.where, rows.schema))
    if query.search:
        wanted.append(_search(query.search, rows.schema))
    return reduce(lambda left, right: left & right, wanted) if wanted else None


def find_rows(
    rows: Rows,
    query: Query,
    *,
    limit: int | None,
    offset: int = 0,
    seconds: float = 30.0,
    count_seconds: float = 5.0,
) -> Found:
    """The positions of `limit` rows from the `offset`-th match on; None: all of them.

    Looking ends after `seconds`; counting more matches than were asked for ends after `count_seconds`.
    """
    condition = condition_of(rows, query)
    stop = None if limit is None else offset + limit
    if query.sample is not None:
        return _sample(rows, query, condition, limit, seconds)
    if query.sort:
        return _sorted(rows, query.sort, condition, slice(offset, stop), seconds)
    if condition is None:
        return Found(list(range(len(rows))[offset:stop]), len(rows), len(rows))
    started = time.monotonic()
    positions: list[int] = []
    matches = searched = 0
    for looked_at, hits in _matching(rows, condition, []):
        searched = looked_at
        if stop is None or matches < stop:
            positions += hits[_POSITION].to_list()
        matches += hits.height
        enough = stop is not None and matches >= stop
        if time.monotonic() - started > (min(seconds, count_seconds) if enough else seconds):
            break
    return Found(positions[offset:stop], matches if searched == len(rows) else None, searched)


def _matching(
    rows: Rows, condition: pl.Expr | None, columns: Sequence[str]
) -> Iterator[tuple[int, pl.DataFrame]]:
    """(rows looked at so far, the matching ones among the last of them with their positions)."""
    needed = list(dict.fromkeys([*columns, *(condition.meta.root_names() if condition is not None else ())]))
    searched = 0
    for chunk in rows.scan(needed or [next(iter(rows.schema))]):
        frame = chunk.frame.with_row_index(_POSITION, chunk.start)
        if condition is not None:
            frame = apply_condition(frame, condition)
        searched += chunk.frame.height
        yield searched, frame.select(_POSITION, *columns)


def _sorted(rows: Rows, sort: str, condition: pl.Expr | None, page: slice, seconds: float) -> Found:
    column, descending = sort.removeprefix("-"), sort.startswith("-")
    kind = rows.schema[rows.check_columns([column])[0]]
    if kind.is_nested():
        raise DataError(f"rows cannot be sorted by {column}, which is {kind}")
    started, matches, searched = time.monotonic(), 0, 0
    frames: list[pl.DataFrame] = []

    def best() -> pl.DataFrame:
        ordered = pl.concat(frames).sort(column, descending=descending, nulls_last=True, maintain_order=True)
        return ordered if page.stop is None else ordered.head(page.stop)

    for looked_at, hits in _matching(rows, condition, [column]):
        searched = looked_at
        matches += hits.height
        frames.append(hits.with_columns(pl.col(column).fill_nan(None)) if kind.is_float() else hits)
        if page.stop is not None:  # no more are kept than can be wanted
            frames = [best()]
        if time.monotonic() - started > seconds:
            break
    positions = best()[_POSITION].to_list() if frames else []
    return Found(positions[page], matches if searched == len(rows) else None, searched)


def _sample(rows: Rows, query: Query, condition: pl.Expr | None, limit: int | None, seconds: float) -> Found:
    """Rows drawn without replacement by the seed, in the query's order."""
    among = Found([], len(rows), len(rows))
    population: Sequence[int] = range(len(rows))
    if condition is not None:
        among = find_rows(rows, Query(query.where, query.search), limit=None, seconds=seconds)
        population = among.positions
    size = len(population) if limit is None else min(limit, len(population))
    drawn = sorted(random.Random(query.sample).sample(population, size))
    if query.sort and drawn:
        column, descending = query.sort.removeprefix("-"), query.sort.startswith("-")
        keys = rows.take(drawn, rows.check_columns([column])).with_columns(pl.Series(_POSITION, drawn))
        drawn = keys.sort(column, descending=descending, nulls_last=True)[_POSITION].to_list()
    return Found(drawn, among.matches, among.searched)


def _search(text: str, schema: pl.Schema) -> pl.Expr:
    """Whether a text column, or a text inside a list or a conversation, holds these characters, in upper or lower case."""
    wanted = [
        found
        for name, kind in schema.items()
        if (found := _holds(pl.col(name), kind, text.lower())) is not None
    ]
    return reduce(lambda left, right: left | right, wanted, pl.lit(False))


def _holds(column: pl.Expr, kind: pl.DataType, text: str) -> pl.Expr | None:
    if kind == pl.String:
        return column.str.to_lowercase().str.contains(text, literal=True).fill_null(False)
    if isinstance(kind, pl.Struct):
        inside = [
            found
            for field in kind.fields
            if (found := _holds(column.struct.field(field.name), _instance(field.dtype), text)) is not None
        ]
        return reduce(lambda left, right: left | right, inside) if inside else None
    if isinstance(kind, pl.List):
        element = _holds(pl.element(), _instance(kind.inner), text)
        return None if element is None else column.list.eval(element).list.any().fill_null(False)
    return None


def _instance(kind: Any) -> pl.DataType:
    made: pl.DataType = kind() if isinstance(kind, type) else kind
    return made
