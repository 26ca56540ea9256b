"""Checks on values that an Arrow schema cannot express. A stage lists them in its `Table`.

    checks=(one_of("split", ("train", "eval")), at_least("token_ids", 0), finite("reward"))

A check gets one row group and returns the first fault as a sentence, or None. Checks see whole
columns, so they cost a small part of the write. In list columns, `at_least`, `finite` and
`in_range` check the innermost items.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.table import Check


def one_of(name: str, allowed: tuple[str, ...]) -> Check:
    """Every value is one of these strings."""

    def check(rows: pa.RecordBatch) -> str | None:
        fits = pc.is_in(rows[name], value_set=pa.array(allowed, pa.string()))
        if pc.all(fits).as_py():
            return None
        found = rows[name].filter(pc.invert(fits))[0].as_py()
        return f"{name} holds {found!r}, expected one of {', '.join(allowed)}."

    return check


def at_least(name: str, minimum: int) -> Check:
    """No value is null or below the minimum."""

    def check(rows: pa.RecordBatch) -> str | None:
        values = _values(rows, name)
        if values.null_count:
            return f"{name} holds a null, expected whole numbers of at least {minimum}."
        if len(values) and (found := pc.min(values).as_py()) < minimum:
            return f"{name} holds {found}, expected at least {minimum}."
        return None

    return check


def finite(*names: str) -> Check:
    """No value is a NaN or an infinity. Nulls pass."""

    def check(rows: pa.RecordBatch) -> str | None:
        return next((fault for name in names if (fault := _not_finite(rows, name))), None)

    return check


def in_range(name: str, low: float, high: float) -> Check:
    """Every value is finite and in [low, high]. Nulls pass."""

    def check(rows: pa.RecordBatch) -> str | None:
        if fault := _not_finite(rows, name):
            return fault
        found = pc.min_max(_values(rows, name)).as_py()
        if found["min"] is None or (found["min"] >= low and found["max"] <= high):
            return None
        return f"{name} ranges over [{found['min']}, {found['max']}], expected within [{low}, {high}]."

    return check


def ordered(low: str, high: str) -> Check:
    """Each value of one column is at most the value of the other, item by item in lists."""

    def check(rows: pa.RecordBatch) -> str | None:
        fits = pc.all(pc.less_equal(_values(rows, low), _values(rows, high))).as_py()
        return f"a {low} is above its {high}." if fits is False else None

    return check


def ascending(name: str) -> Check:
    """The items of every list are sorted."""

    def check(rows: pa.RecordBatch) -> str | None:
        items, owner = (array.to_numpy(zero_copy_only=False) for array in _items(rows, name))
        falls = np.flatnonzero((items[1:] < items[:-1]) & (owner[1:] == owner[:-1]))
        return f"{name} of row {owner[falls[0] + 1]} are not ascending. Sort them." if falls.size else None

    return check


def no_null_items(name: str) -> Check:
    """No item of a list is null."""

    def check(rows: pa.RecordBatch) -> str | None:
        items, owner = _items(rows, name)
        if not items.null_count:
            return None
        row = owner[items.is_null().index(True).as_py()].as_py()
        return f"{name} of row {row} holds a null. Remove the item, or reject the row."

    return check


def lists_agree(*names: str) -> Check:
    """In every row the lists of these columns have one length, and no null items."""

    def check(rows: pa.RecordBatch) -> str | None:
        expected = pc.list_value_length(rows[names[0]])
        for name in names:
            differs = pc.not_equal(pc.list_value_length(rows[name]), expected)
            fault = no_null_items(name)(rows) or _broken(
                differs, f"must have lists of one length in {names[0]} and {name}"
            )
            if fault:
                return fault
        return None

    return check


def length_equals(name: str, count: str) -> Check:
    """The list has as many items as another column says."""
    return rule(
        f"must have {count} equal to the length of {name}",
        lambda rows: pc.not_equal(pc.list_value_length(rows[name]), rows[count]),
    )


def rule(text: str, broken: Callable[[pa.RecordBatch], pa.Array]) -> Check:
    """Any other rule: `broken` gives a boolean per row, `text` ends the sentence "a row ..."."""
    return lambda rows: _broken(broken(rows), text)


def _broken(found: pa.Array, text: str) -> str | None:
    if not pc.any(found).as_py():
        return None
    count, first = pc.sum(found).as_py(), pc.index(found, True).as_py()
    return f"{count} rows break a rule, first row {first}: a row {text}."


def _not_finite(rows: pa.RecordBatch, name: str) -> str | None:
    if pc.all(pc.is_finite(_values(rows, name))).as_py() is not False:
        return None
    return f"{name} holds a NaN or an infinity, expected finite numbers. Reject such rows."


def _values(rows: pa.RecordBatch, name: str) -> pa.Array:
    """The values of a column in one array; of a list column, the innermost items."""
    values = rows[name]
    while pa.types.is_list(values.type):
        values = values.flatten()
    return values


def _items(rows: pa.RecordBatch, name: str) -> tuple[pa.Array, pa.Array]:
    """The items of a list column in one array, and the row of each."""
    return rows[name].flatten(), pc.list_parent_indices(rows[name])
