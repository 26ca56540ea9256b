"""Numbers of an artifact: nulls, extremes, quantiles and a histogram of every numeric column.

Parquet footers give exact nulls, minima and maxima. Quantiles, means and histograms come from all
rows if there are few, else from parts spread evenly over the artifact; then `estimated_from` says
how many rows were read. A list column counts every element. A list of named values (`components`)
counts as one column per name.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from flows.views.inspect.filters import apply_condition
from flows.views.inspect.rows import ArtifactRows
from tasks.artifact_summary import numbers_of

_MAX_ROWS = 100_000  # rows that quantiles are estimated from
_MAX_TOKEN_ROWS = 10_000  # the same for columns of token ids, which are long
_MAX_FOOTERS = 1_000  # parts; an artifact with more gets estimated extremes and no null counts


def summarise(
    rows: ArtifactRows,
    *,
    columns: Sequence[str] | None = None,
    condition: pl.Expr | None = None,
    exact: bool = False,
) -> dict[str, Any]:
    """Numeric column -> count, mean, std, min, max, quantiles (at QUANTILES), histogram,
    estimated_from.

    `exact_extremes` says whether min and max are those of all rows. `exact` reads every row. With a
    condition, the numbers are those of the rows that meet it.
    """
    if not len(rows):
        return {}
    wanted = [name for name in rows.schema if columns is None or name in columns]
    tokens = [name for name in wanted if "token_ids" in name]
    others = [
        n for n in wanted if n not in tokens and (_is_numeric(rows.schema[n]) or _is_named(rows.schema[n]))
    ]
    extremes = _extremes(rows, others, exact) if condition is None else {}
    numbers: dict[str, Any] = {}
    for names, budget in ((others, _MAX_ROWS), (tokens, _MAX_TOKEN_ROWS)):
        if not names:
            continue
        frame, looked_at = _sample(rows, names, condition, len(rows) if exact else budget)
        for name in names:
            for shown, values in _series(frame[name]):
                known = numbers_of(values)
                if known is None:
                    continue
                if shown in extremes:
                    known["min"], known["max"] = extremes[shown]
                known["quantiles"][0], known["quantiles"][-1] = known["min"], known["max"]
                known["exact_extremes"] = looked_at == len(rows) or shown in extremes
                known["estimated_from"] = looked_at if looked_at < len(rows) else None
                numbers[shown] = known
    return numbers


def column_nulls(rows: ArtifactRows, *, exact: bool = False) -> dict[str, int | None]:
    """Column -> exact number of null rows. None where the footers do not say and there are many
    rows."""
    nullable = [field.name for field in rows.arrow_schema if field.nullable]
    counts: dict[str, int | None] = dict.fromkeys(rows.schema, 0) | dict.fromkeys(nullable)
    if len(rows.parts) > _MAX_FOOTERS and not exact:
        return counts
    for name, chunks in _footer_columns(rows, nullable).items():
        flat = all(c.path_in_schema == name and c.statistics and c.statistics.has_null_count for c in chunks)
        counts[name] = sum(chunk.statistics.null_count for chunk in chunks) if flat else None
    unknown = [name for name in nullable if counts[name] is None]
    if unknown and (exact or len(rows) <= _MAX_ROWS):  # the footer of a list counts its elements
        counts |= dict.fromkeys(unknown, 0)
        for _, frame in rows.scan(unknown):
            counts |= {name: (counts[name] or 0) + frame[name].null_count() for name in unknown}
    return counts


def _sample(
    rows: ArtifactRows, columns: Sequence[str], condition: pl.Expr | None, budget: int
) -> tuple[pl.DataFrame, int]:
    """The rows that meet the condition among about `budget` rows of evenly spread parts; and how
    many were read."""
    parts = [part for part in rows.parts if part.rows]
    if len(rows) > budget:
        count = max(1, round(len(parts) * budget / len(rows)))
        parts = [parts[(2 * place + 1) * len(parts) // (2 * count)] for place in range(count)]
    needed = list(dict.fromkeys([*columns, *(condition.meta.root_names() if condition is not None else ())]))
    frames, looked_at = [], 0
    for part in parts:
        part_rows = 0
        for _, frame in ArtifactRows(rows.store, [part]).scan(needed):
            part_rows += frame.height
            frames.append((frame if condition is None else apply_condition(frame, condition)).select(columns))
            if part_rows >= budget / len(parts) and len(rows) > budget:
                break
        looked_at += part_rows
    return pl.concat(frames), looked_at


def _extremes(rows: ArtifactRows, columns: Sequence[str], exact: bool) -> dict[str, tuple[float, float]]:
    """Numeric column -> minimum and maximum, if the footer of every row group has them."""
    if len(rows.parts) > _MAX_FOOTERS and not exact:
        return {}
    numeric = [name for name in columns if _is_numeric(rows.schema[name])]
    found = {}
    for name, chunks in _footer_columns(rows, numeric).items():
        known = [
            c.statistics for c in chunks if not c.statistics or c.statistics.num_values
        ]  # all null: no gap
        if known and all(statistics and statistics.has_min_max for statistics in known):
            found[name] = float(min(s.min for s in known)), float(max(s.max for s in known))
    return found


def _footer_columns(rows: ArtifactRows, columns: Sequence[str]) -> dict[str, list[pq.ColumnChunkMetaData]]:
    """Column -> what the footers of all parts say of it, by row group and leaf."""
    found: dict[str, list[pq.ColumnChunkMetaData]] = {name: [] for name in columns}
    for footer in rows.footers if columns else ():
        for group in map(footer.row_group, range(footer.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                name = chunk.path_in_schema.partition(".")[0]
                if name in found:
                    found[name].append(chunk)
    return found


def _series(values: pl.Series) -> Iterator[tuple[str, pl.Series]]:
    """The column's numbers: its values, the lengths of token lists, or one series per name of named
    values."""
    name = values.name
    if _is_named(values.dtype):
        pairs = _flat(values).drop_nulls().to_frame().unnest(name)
        for key in pairs["name"].unique(maintain_order=True):
            yield f"{name}.{key}", pairs.filter(pl.col("name") == key)["value"]
        return
    lengths = "token_ids" in name
    while isinstance(values.dtype, pl.List) and not (lengths and not isinstance(values.dtype.inner, pl.List)):
        values = _flat(values)
    yield (f"{name} (length)", values.list.len()) if lengths else (name, values)


def _flat(values: pl.Series) -> pl.Series:
    """The elements of all lists, without empty lists and nulls."""
    return values.explode(empty_as_null=False, keep_nulls=False)


def _is_numeric(kind: Any) -> bool:
    return kind.is_numeric() or (isinstance(kind, pl.List) and _is_numeric(kind.inner))


def _is_named(kind: Any) -> bool:
    """Whether it is a list of values with names, like `components` of rewards."""
    if not isinstance(kind, pl.List) or not isinstance(kind.inner, pl.Struct):
        return False
    fields = {field.name: field.dtype for field in kind.inner.fields}
    return fields.keys() == {"name", "value"} and _is_numeric(fields["value"])
