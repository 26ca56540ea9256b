"""Numbers of an artifact at a glance: nulls, extremes, quantiles and a histogram of every numeric column.

What Parquet footers hold (rows, nulls, least, most) is exact. Quantiles, means and histograms come from all rows where there are few,
else from row groups spread evenly over the artifact, and then `estimated_from` says how many rows that was.
A list column counts every element; a list of named values (`components`) counts as one column for each name.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from flows.views.inspect.filters import apply_condition
from flows.views.inspect.rows import Group, Rows

__all__ = ["QUANTILES", "column_nulls", "numbers_of", "summarise"]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_BINS = 32
_MOST_ROWS = 100_000  # rows that quantiles are estimated from
_MOST_LENGTHS = 10_000  # of them with their token lists, which are long
_MOST_FOOTERS = 1_000  # parts; past it, extremes are estimates too, and nulls are not told


def summarise(
    rows: Rows, *, columns: Sequence[str] | None = None, condition: pl.Expr | None = None, exact: bool = False
) -> dict[str, Any]:
    """Numeric column -> count, nulls, mean, min, max, quantiles (at QUANTILES), histogram, estimated_from.

    `exact_extremes` says whether min and max are those of all rows. `exact` reads every row and footer. With a condition, of the rows that meet it; footers say nothing of those, so all of it then comes from the rows read.
    """
    wanted = [name for name in rows.schema if columns is None or name in columns]
    most = len(rows) if exact else _MOST_ROWS
    footers = _footer_statistics(rows, wanted, exact) if condition is None else {}
    numbers: dict[str, Any] = {}
    read = [name for name in wanted if _is_numeric(rows.schema[name]) and "token_ids" not in name]
    read += [name for name in wanted if _is_named(rows.schema[name])]
    for names, budget in (
        (read, most),
        ([n for n in wanted if "token_ids" in n], most if exact else _MOST_LENGTHS),
    ):
        if not names or not len(rows):
            continue
        frame, looked_at = _sampled(rows, names, condition, budget)
        for name in names:
            for shown, values in _series(frame[name]):
                known = numbers_of(values)
                if known is None:
                    continue
                extremes = footers.get(name) if shown == name else None
                known |= {"min": extremes[0], "max": extremes[1]} if extremes else {}
                known["exact_extremes"] = looked_at == len(rows) or extremes is not None
                known["quantiles"][0], known["quantiles"][-1] = known["min"], known["max"]
                known["estimated_from"] = looked_at if looked_at < len(rows) else None
                numbers[shown] = known
    return numbers


def column_nulls(rows: Rows, *, exact: bool = False) -> dict[str, int | None]:
    """Column -> null rows, exact, from the footers, or of few rows by counting; None where neither says."""
    never = {field.name for field in rows.arrow_schema if not field.nullable}
    if len(rows.records) > _MOST_FOOTERS and not exact:
        return {name: 0 if name in never else None for name in rows.schema}
    counts: dict[str, int | None] = dict.fromkeys(rows.schema, 0)
    for _, name, column in _column_chunks(rows, [name for name in rows.schema if name not in never]):
        known = column.statistics is not None and column.statistics.has_null_count
        flat = column.path_in_schema == name
        held = counts[name]
        counts[name] = held + column.statistics.null_count if known and flat and held is not None else None
    unknown = [name for name, count in counts.items() if count is None]
    if unknown and (exact or len(rows) <= _MOST_ROWS):  # a list's footer counts its elements
        counts |= dict.fromkeys(unknown, 0)
        for chunk in rows.scan(unknown):
            counts |= {name: (counts[name] or 0) + chunk.frame[name].null_count() for name in unknown}
    return counts


def _footer_statistics(rows: Rows, columns: Sequence[str], exact: bool) -> dict[str, tuple[float, float]]:
    """Numeric column -> its least and greatest value, where every row group's footer says."""
    numeric = [name for name in columns if _is_numeric(rows.schema[name]) and "token_ids" not in name]
    if len(rows.records) > _MOST_FOOTERS and not exact:
        return {}
    found: dict[str, tuple[float, float]] = {}
    silent: set[str] = set()
    for _, name, column in _column_chunks(rows, numeric):
        statistics = column.statistics
        if statistics is None or not statistics.has_min_max:
            if statistics is None or statistics.num_values:  # all null is no gap
                silent.add(name)
            continue
        low, high = float(statistics.min), float(statistics.max)
        before = found.get(name, (low, high))
        found[name] = min(low, before[0]), max(high, before[1])
    return {name: extremes for name, extremes in found.items() if name not in silent}


def _column_chunks(rows: Rows, columns: Sequence[str]) -> Iterator[tuple[int, str, pq.ColumnChunkMetaData]]:
    if not columns:
        return
    for part in range(len(rows.records)):
        footer = rows.footer(part)
        if not footer.num_row_groups:
            continue
        paths = [footer.schema.column(leaf).path.partition(".")[0] for leaf in range(footer.num_columns)]
        leaves = [(leaf, name) for leaf, name in enumerate(paths) if name in columns]
        for group in range(footer.num_row_groups):
            described = footer.row_group(group)
            for leaf, name in leaves:
                yield part, name, described.column(leaf)


def _sampled(
    rows: Rows, columns: Sequence[str], condition: pl.Expr | None, budget: int
) -> tuple[pl.DataFrame, int]:
    """The columns of all rows where they are few, else of about `budget` rows in groups evenly spread; and how many were read."""
    needed = list(dict.fromkeys([*columns, *(condition.meta.root_names() if condition is not None else ())]))
    frames, read = [], 0
    for groups in _spread(rows, budget):
        frame = rows.read(groups, needed)
        read += frame.height
        frames.append(frame if condition is None else apply_condition(frame, condition).select(columns))
    return pl.concat(frames), read


def _spread(rows: Rows, budget: int) -> Iterator[list[Group]]:
    """Row groups of one part at a time: all of them, or evenly spread ones that hold about `budget` rows."""
    parts = [part for part, record in enumerate(rows.records) if record.rows]
    if len(rows) <= budget:
        yield from (rows.groups(part) for part in parts)
        return
    most = max(1, round(len(parts) * budget / len(rows)))
    chosen = [parts[(2 * place + 1) * len(parts) // (2 * most)] for place in range(most)]
    share = max(1, budget // most)
    for part in chosen:
        groups = rows.groups(part)
        few = max(1, round(len(groups) * share / sum(group.rows for group in groups)))
        yield [groups[(2 * place + 1) * len(groups) // (2 * few)] for place in range(min(few, len(groups)))]


def _series(values: pl.Series) -> Iterator[tuple[str, pl.Series]]:
    """The column's numbers: itself, the lengths of token lists, or one series for each name of named values."""
    name, kind = values.name, values.dtype
    if "token_ids" in name:
        while isinstance(kind, pl.List) and isinstance(kind.inner, pl.List):
            values, kind = _flat(values), kind.inner
        yield f"{name} (length)", values.list.len()
    elif _is_named(kind):
        pairs = _flat(values).drop_nulls().to_frame().unnest(name)
        for key in pairs["name"].unique(maintain_order=True):
            yield f"{name}.{key}", pairs.filter(pl.col("name") == key)["value"]
    else:
        while isinstance(values.dtype, pl.List):
            values = _flat(values)
        yield name, values


def numbers_of(values: pl.Series) -> dict[str, Any] | None:
    """Count, mean, extremes, quantiles and histogram of a series' finite values; None where it has none or is no number."""
    if not values.dtype.is_numeric():
        return None
    finite = values.cast(pl.Float64).drop_nulls().drop_nans()
    finite = finite.filter(finite.is_finite())
    if finite.is_empty():
        return None
    quantiles = [finite.quantile(share, "linear") for share in QUANTILES]
    low, high = float(quantiles[0] or 0.0), float(quantiles[-1] or 0.0)
    return {
        "count": len(finite),
        "mean": finite.mean(),
        "std": finite.std(),
        "min": low,
        "max": high,
        "quantiles": quantiles,
        "histogram": {"low": low, "high": high, "counts": _histogram(finite, low, high)},
    }


def _histogram(values: pl.Series, low: float, high: float) -> list[int]:
    if high <= low:
        return [len(values)]
    places = ((values - low) / (high - low) * _BINS).floor().clip(0, _BINS - 1).cast(pl.Int32)
    counts = dict(places.value_counts().iter_rows())
    return [counts.get(place, 0) for place in range(_BINS)]


def _flat(values: pl.Series) -> pl.Series:
    """The elements of all lists; empty lists and nulls give none."""
    return values.explode(empty_as_null=False, keep_nulls=False)


def _is_numeric(kind: Any) -> bool:
    return kind.is_numeric() or (isinstance(kind, pl.List) and _is_numeric(kind.inner))


def _is_named(kind: Any) -> bool:
    """Whether it is a list of values with names, as rewards' components are."""
    if not isinstance(kind, pl.List) or not isinstance(kind.inner, pl.Struct):
        return False
    fields = {field.name: field.dtype for field in kind.inner.fields}
    return fields.keys() == {"name", "value"} and _is_numeric(fields["value"])
