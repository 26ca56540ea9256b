"""What each stage's table holds: columns, types, where nulls are allowed, and the columns that identify a row.

A stage may add columns after these. Arrow schemas say it in one place, in the terms of the files themselves; what a
schema cannot say (ranges, unique keys, lists of one length) is in `storage.validation`.
"""

import pyarrow as pa

from storage.errors import SchemaError

__all__ = ["KEYS", "REJECTS", "SCHEMAS", "conform", "rejects_table"]


def _column(name: str, kind: pa.DataType, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null)


_TEXT, _INT, _REAL, _FLAG = pa.string(), pa.int32(), pa.float32(), pa.bool_()
_TOKENS = pa.list_(_INT)
_MESSAGES = pa.list_(pa.struct([_column("role", _TEXT), _column("content", _TEXT)]))
_COMPONENTS = pa.list_(pa.struct([_column("name", _TEXT), _column("value", _REAL, null=True)]))

SCHEMAS: dict[str, pa.Schema] = {
    "prompts": pa.schema(
        [
            _column("prompt_id", _TEXT),
            _column("messages", _MESSAGES),
            _column("split", _TEXT),
            _column("source", _TEXT),
            _column("offline_completions", pa.list_(_TEXT)),
            _column("metadata", _TEXT),
            _column("conversational", _FLAG),
        ]
    ),
    "completions": pa.schema(
        [
            _column("prompt_id", _TEXT),
            _column("sample_index", _INT),
            _column("origin", _TEXT),
            _column("text", _TEXT),
            _column("token_ids", _TOKENS),
            _column("finish_reason", _TEXT, null=True),
            _column("sampled_logprob", _REAL, null=True),
        ]
    ),
    "rewards": pa.schema(
        [
            _column("prompt_id", _TEXT),
            _column("sample_index", _INT),
            _column("origin", _TEXT),
            _column("reward", _REAL, null=True),
            _column("components", _COMPONENTS, null=True),
            _column("error", _TEXT, null=True),
        ]
    ),
    "quantiles": pa.schema(
        [
            _column("prompt_id", _TEXT),
            _column("ref_rewards", pa.list_(_REAL)),
            _column("num_ref", _INT),
            _column("ref_mean", _REAL, null=True),
            _column("ref_std", _REAL, null=True),
            _column("sample_index", pa.list_(_INT)),
            _column("origin", pa.list_(_TEXT)),
            _column("reward", pa.list_(_REAL)),
            _column("quantile_reward", pa.list_(_REAL)),
            _column("quantile_low", pa.list_(_REAL)),
            _column("quantile_high", pa.list_(_REAL)),
        ]
    ),
    "shards": pa.schema(
        [
            _column("prompt_id", _TEXT),
            _column("prompt_token_ids", _TOKENS),
            _column("completion_token_ids", pa.list_(_TOKENS)),
            _column("sample_index", pa.list_(_INT)),
            _column("origin", pa.list_(_TEXT)),
            _column("reward", pa.list_(_REAL)),
            _column("quantile_reward", pa.list_(_REAL)),
            _column("quantile_low", pa.list_(_REAL)),
            _column("quantile_high", pa.list_(_REAL)),
            _column("ref_logprob", pa.list_(_REAL)),
            _column("num_ref", _INT),
            _column("ref_mean", _REAL, null=True),
            _column("ref_std", _REAL, null=True),
        ]
    ),
    "evaluation": pa.schema(
        [
            _column("prompt_id", _TEXT),
            _column("model", _TEXT),
            _column("sample_index", _INT),
            _column("text", _TEXT),
            _column("token_ids", _TOKENS),
            _column("finish_reason", _TEXT, null=True),
            _column("reward", _REAL, null=True),
            _column("quantile_reward", _REAL, null=True),
            _column("model_logprob", _REAL, null=True),
            _column("ref_logprob", _REAL, null=True),
            _column("model_token_logprobs", pa.list_(_REAL), null=True),
            _column("ref_token_logprobs", pa.list_(_REAL), null=True),
        ]
    ),
}
"""Stage -> the columns that its table must have, in this order. Stages that are not here keep what they are given."""

REJECTS = pa.schema(
    [
        _column("stage", _TEXT),
        _column("key", _TEXT),
        _column("reason", _TEXT),
        _column("prompt_id", _TEXT, null=True),
    ]
)
"""The columns of every rejects.parquet: which row (or file and line) was left out by which stage, and why."""

KEYS: dict[str, tuple[str, ...]] = {
    "prompts": ("prompt_id",),
    "completions": ("prompt_id", "origin", "sample_index"),
    "rewards": ("prompt_id", "origin", "sample_index"),
    "quantiles": ("prompt_id",),
    "shards": ("prompt_id",),
    "evaluation": ("prompt_id", "model", "sample_index"),
}
"""Stage -> the columns whose values together appear once in a part."""


def rejects_table(rows: list[dict[str, str | None]]) -> pa.Table:
    """Rows of `stage`, `key`, `reason` and optionally `prompt_id` as a rejects table."""
    return pa.Table.from_pylist([{"prompt_id": None, **row} for row in rows], schema=REJECTS)


def conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table with the schema's columns first, then its own; raises SchemaError where they do not fit.

    Another encoding of the same type (large_string, dictionary, list views, an all-null column) is turned into the
    schema's; another type, say float64 for float32 or int64 for int32, is an error and never a silent rounding.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise SchemaError(
            f"{where}: column {', '.join(missing)} is missing. Got {', '.join(table.column_names) or 'no columns'}; "
            f"expected {', '.join(schema.names)}. Build the table with schema=storage.SCHEMAS[stage]."
        )
    doubled = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if doubled:
        raise SchemaError(
            f"{where}: column {', '.join(doubled)} appears twice. Give every column a name of its own."
        )
    fields = list(schema)
    columns = [_as_type(table.column(field.name), field, where) for field in schema]
    for name in table.column_names:
        if name not in schema.names:
            fields.append(pa.field(name, table.schema.field(name).type))
            columns.append(table.column(name))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _as_type(column: pa.ChunkedArray, field: pa.Field, where: str) -> pa.ChunkedArray:
    if column.type != field.type:
        if not _same_values(column.type, field.type):
            raise SchemaError(
                f"{where}: column {field.name} has the type {column.type}, expected {field.type}. "
                "Build the table with schema=storage.SCHEMAS[stage]."
            )
        try:
            column = column.cast(field.type)
        except pa.ArrowInvalid as error:  # a null inside a type that forbids it, a chunk past 2 GiB of text
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
        return _is_listing(got) and _same_values(got.value_type, want.value_type)
    if pa.types.is_struct(want):
        if not pa.types.is_struct(got) or [f.name for f in got] != [f.name for f in want]:
            return False
        return all(_same_values(a.type, b.type) for a, b in zip(got, want, strict=True))
    return bool(got == want)


def _is_listing(kind: pa.DataType) -> bool:
    t = pa.types
    return any(
        test(kind)
        for test in (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view, t.is_large_list_view)
    )
