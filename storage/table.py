"""What a caller requires of a part's rows: columns, key, checks on values, row group size.

The store knows no stage: `Store.commit_part(..., table=Table(...))` brings the requirements along.
Columns may be added after those of the schema.

Not dataframely 3.1: it validates one polars frame at a time. Keys that are unique over a stream of
row groups and the exact Arrow types on disk would still be checked here, and that is most of the
code.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import SchemaError

Check: TypeAlias = Callable[[pa.RecordBatch], str | None]
"""Looks for a fault in the values of a row group: a sentence, or None."""

_NO_SCHEMA = pa.schema([])


@dataclass(frozen=True)
class Table:
    """What each part of a stage must satisfy; the default accepts any table.

    `key` names the columns whose values together appear once in a part. `group_rows` is the largest
    number of rows in one Parquet row group.
    """

    schema: pa.Schema = _NO_SCHEMA
    key: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    group_rows: int = 65_536

    def check(self, rows: pa.Table, where: str) -> None:
        """Raise SchemaError with the first fault in the values of these rows."""
        for batch in rows.to_batches():
            for check in self.checks:
                if fault := check(batch):
                    raise SchemaError(f"{where}: {fault}")


def column(name: str, kind: pa.DataType, *, null: bool = False) -> pa.Field:
    """A column of a schema; unlike `pyarrow.field`, without nulls unless `null` is set."""
    return pa.field(name, kind, nullable=null)


REJECTS = pa.schema(
    [
        column("stage", pa.string()),
        column("key", pa.string()),
        column("reason", pa.string()),
        column("prompt_id", pa.string(), null=True),
    ]
)
"""The columns of every rejects.parquet: stage, rejected row (or file and line), reason."""


def rejects_table(rows: list[dict[str, str | None]]) -> pa.Table:
    """Rows of `stage`, `key`, `reason` and optionally `prompt_id` as a rejects table."""
    return pa.Table.from_pylist([{"prompt_id": None, **row} for row in rows], schema=REJECTS)


def check_unique(written: Path, key: Sequence[str], where: str) -> None:
    """Raise SchemaError where a key repeats in a Parquet file.

    Keeps 8 bytes per row: a hash of its key. Only rows whose hashes are equal are compared in full.
    """
    import polars as pl

    with pq.ParquetFile(written) as file:

        def frames() -> Iterator[pl.DataFrame]:
            return (cast(pl.DataFrame, pl.from_arrow(rows)) for rows in file.iter_batches(columns=list(key)))

        hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *(rows.hash_rows() for rows in frames())]))
        equal = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if not equal.size:
            return
        suspects = pl.concat([rows.filter(np.isin(rows.hash_rows(), equal)) for rows in frames()])
    counts = suspects.group_by(key, maintain_order=True).len("__count")
    repeated = counts.filter(pl.col("__count") > 1)
    if repeated.height:
        first = repeated.row(0, named=True)
        times = first.pop("__count")
        raise SchemaError(
            f"{where}: the row {first} appears {times} times, expected once. {repeated.height} keys "
            f"({', '.join(key)}) of {len(hashes)} rows repeat. Remove or reject the repeated rows."
        )


def conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table with the schema's columns first, then the others; raises SchemaError where a column
    does not fit.

    Another encoding of the same type (large_string, dictionary, list views, an all-null column) is
    cast. Another type, say float64 for float32, is an error and never rounded silently.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise SchemaError(
            f"{where}: column {', '.join(missing)} is missing. Got {', '.join(table.column_names) or 'no columns'}; "
            f"expected {', '.join(schema.names)}. Build the table with that schema."
        )
    doubled = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if doubled:
        raise SchemaError(
            f"{where}: column {', '.join(doubled)} appears twice. Give every column another name."
        )
    fields = list(schema)
    columns = [_as_type(table.column(field.name), field, where) for field in schema]
    for name in table.column_names:
        if name not in schema.names:
            fields.append(pa.field(name, table.schema.field(name).type))
            columns.append(table.column(name))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list in any of Arrow's encodings."""
    t = pa.types
    return any(
        test(kind)
        for test in (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view, t.is_large_list_view)
    )


def _as_type(column: pa.ChunkedArray, field: pa.Field, where: str) -> pa.ChunkedArray:
    if column.type != field.type:
        if not _same_values(column.type, field.type):
            raise SchemaError(
                f"{where}: column {field.name} has the type {column.type}, expected {field.type}. "
                "Build the table with that schema."
            )
        try:
            column = column.cast(field.type)
        except pa.ArrowInvalid as error:  # a nested null, 2 GiB of text
            raise SchemaError(f"{where}: column {field.name} does not fit {field.type}: {error}.") from None
    if not field.nullable and column.null_count:
        row = column.is_null().index(True).as_py()
        raise SchemaError(
            f"{where}: column {field.name} is null in {column.null_count} of {len(column)} rows, first in row {row}. "
            "Nulls are not allowed there: reject such rows with a reason."
        )
    return column


def _same_values(got: pa.DataType, want: pa.DataType) -> bool:
    """Whether two types hold the same values and differ in encoding only."""
    if pa.types.is_null(got):
        return True
    if pa.types.is_dictionary(got):
        return _same_values(got.value_type, want)
    if pa.types.is_string(want):
        return bool(pa.types.is_string(got) or pa.types.is_large_string(got) or pa.types.is_string_view(got))
    if pa.types.is_list(want):
        return is_list(got) and _same_values(got.value_type, want.value_type)
    if pa.types.is_struct(want):
        if not pa.types.is_struct(got) or [f.name for f in got] != [f.name for f in want]:
            return False
        return all(_same_values(a.type, b.type) for a, b in zip(got, want, strict=True))
    return bool(got == want)
