"""Checks on a stage's rows that a schema cannot say: ranges, lists of one length, unique keys. Run on every write.

All of them work on whole columns, so that they cost a small part of the write itself.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import SchemaError
from storage.tables import KEYS

__all__ = ["KeyCheck", "check_rows"]

_PER_COMPLETION = ("sample_index", "origin", "reward", "quantile_reward", "quantile_low", "quantile_high")
_ORIGINS = ("reference", "offline", "policy")


def check_rows(stage: str, table: pa.Table, where: str) -> None:
    """Check the values of one table (or a slice of a part's table); raises SchemaError with place and count."""
    if table.num_rows and stage in _CHECKS:
        table = table.combine_chunks()
        _CHECKS[stage](table, where)


class KeyCheck:
    """Whether the key columns of a stage identify its rows, over a part that comes in several tables.

    Keeps 8 bytes a row: a hash of its key. Only rows whose hashes meet are looked at again, in full.
    """

    def __init__(self, stage: str, where: str) -> None:
        self._columns = list(KEYS.get(stage, ()))
        self._where = where
        self._hashes: list[npt.NDArray[np.uint64]] = []

    def add(self, table: pa.Table) -> None:
        """Note the keys of the next rows."""
        if self._columns and table.num_rows:
            self._hashes.append(self._hash(table))

    def finish(self, written: Path) -> None:
        """Compare all keys; raises SchemaError that names one which appears twice in the Parquet file just written."""
        if not self._hashes:
            return
        hashes = np.sort(np.concatenate(self._hashes))
        doubtful = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if not doubtful.size:
            return
        suspects = []
        with pq.ParquetFile(written) as file:
            for batch in file.iter_batches(columns=self._columns):
                table = pa.Table.from_batches([batch])
                suspects.append(table.filter(pa.array(np.isin(self._hash(table), doubtful))))
        counts = (
            pa.concat_tables(suspects)
            .group_by(self._columns, use_threads=False)
            .aggregate([([], "count_all")])
        )
        repeated = counts.filter(pc.greater(counts["count_all"], 1))
        if not repeated.num_rows:
            return
        first = repeated.slice(0, 1).to_pylist()[0]
        times = first.pop("count_all")
        raise SchemaError(
            f"{self._where}: the row {first} appears {times} times, expected once. {repeated.num_rows} keys "
            f"({', '.join(self._columns)}) of {len(hashes)} rows repeat. Leave the repeated rows out, or reject them."
        )

    def _hash(self, table: pa.Table) -> npt.NDArray[np.uint64]:
        import polars as pl

        frame = pl.from_arrow(table.select(self._columns))
        assert isinstance(frame, pl.DataFrame)
        return frame.hash_rows().to_numpy()


def _prompts(table: pa.Table, where: str) -> None:
    _one_of(table, "split", ("train", "eval"), where)
    _no_item_null(table, "offline_completions", where)


def _completions(table: pa.Table, where: str) -> None:
    _one_of(table, "origin", _ORIGINS, where)
    _at_least(table["sample_index"], "sample_index", 0, where)
    _tokens(table, "token_ids", where)
    _finite(table["sampled_logprob"], "sampled_logprob", where)


def _rewards(table: pa.Table, where: str) -> None:
    _one_of(table, "origin", _ORIGINS, where)
    _at_least(table["sample_index"], "sample_index", 0, where)
    _finite(table["reward"], "reward", where)
    neither = pc.equal(table["reward"].is_null(), table["error"].is_null())
    _fail_where(neither, where, "must have either a reward or an error, and not both")


def _quantiles(table: pa.Table, where: str) -> None:
    _lists_agree(table, _PER_COMPLETION, where)
    _quantile_ranges(table, where)
    lengths = pc.list_value_length(table["ref_rewards"])
    _fail_where(
        pc.not_equal(lengths, table["num_ref"]), where, "must have num_ref equal to the length of ref_rewards"
    )
    values, rows = _items(table, "ref_rewards")
    _finite(values, "ref_rewards", where)
    numbers, owner = values.to_numpy(zero_copy_only=False), rows.to_numpy(zero_copy_only=False)
    falls = np.flatnonzero((numbers[1:] < numbers[:-1]) & (owner[1:] == owner[:-1]))
    if falls.size:
        raise SchemaError(f"{where}: ref_rewards of row {owner[falls[0] + 1]} are not ascending. Sort them.")


def _shards(table: pa.Table, where: str) -> None:
    _lists_agree(table, (*_PER_COMPLETION, "ref_logprob", "completion_token_ids"), where)
    _quantile_ranges(table, where)
    _tokens(table, "prompt_token_ids", where)
    values, _ = _items(table, "ref_logprob")
    _finite(values, "ref_logprob", where)
    lists, _ = _items(table, "completion_token_ids")
    if lists.null_count:
        raise SchemaError(f"{where}: completion_token_ids holds a null completion. Reject it with a reason.")
    _at_least(lists.flatten(), "completion_token_ids", 0, where)


def _evaluation(table: pa.Table, where: str) -> None:
    _fail_where(pc.equal(table["model"], ""), where, "must name its model")
    _at_least(table["sample_index"], "sample_index", 0, where)
    _tokens(table, "token_ids", where)
    _lists_agree(table, ("token_ids", "model_token_logprobs", "ref_token_logprobs"), where)
    for name in ("reward", "model_logprob", "ref_logprob"):
        _finite(table[name], name, where)
    _within_unit(table["quantile_reward"], "quantile_reward", where)


_CHECKS: dict[str, Callable[[pa.Table, str], None]] = {
    "prompts": _prompts,
    "completions": _completions,
    "rewards": _rewards,
    "quantiles": _quantiles,
    "shards": _shards,
    "evaluation": _evaluation,
}


def _quantile_ranges(table: pa.Table, where: str) -> None:
    _fail_where(pc.less(table["num_ref"], 1), where, "must have num_ref of 1 or more")
    items = {}
    for name in ("reward", "quantile_reward", "quantile_low", "quantile_high"):
        items[name], _ = _items(table, name)
        (_finite if name == "reward" else _within_unit)(items[name], name, where)
    ordered = pc.less_equal(items["quantile_low"], items["quantile_high"])
    if not pc.all(ordered).as_py() and len(ordered):
        raise SchemaError(
            f"{where}: a quantile_low is above its quantile_high. Check how the interval is computed."
        )


def _lists_agree(table: pa.Table, names: tuple[str, ...], where: str) -> None:
    expected = pc.list_value_length(table[names[0]])
    for name in names:
        _no_item_null(table, name, where)
        differs = pc.not_equal(pc.list_value_length(table[name]), expected)
        _fail_where(differs, where, f"must have lists of one length in {names[0]} and {name}")


def _items(table: pa.Table, name: str) -> tuple[pa.Array, pa.Array]:
    """The items of a list column in one array, and the row that each belongs to."""
    column = table[name].combine_chunks()
    return column.flatten(), pc.list_parent_indices(column)


def _no_item_null(table: pa.Table, name: str, where: str) -> None:
    items, rows = _items(table, name)
    if items.null_count:
        row = rows[items.is_null().index(True).as_py()].as_py()
        raise SchemaError(
            f"{where}: {name} of row {row} holds a null. Leave the completion out, or reject it."
        )


def _tokens(table: pa.Table, name: str, where: str) -> None:
    items, _ = _items(table, name)
    _at_least(items, name, 0, where)


def _at_least(values: pa.Array, name: str, least: int, where: str) -> None:
    if values.null_count:
        raise SchemaError(f"{where}: {name} holds a null, expected whole numbers of at least {least}.")
    if len(values) and (found := pc.min(values).as_py()) < least:
        raise SchemaError(f"{where}: {name} holds {found}, expected at least {least}.")


def _finite(values: pa.Array, name: str, where: str) -> None:
    if (
        len(values)
        and not pc.all(pc.is_finite(values)).as_py()
        and pc.any(pc.invert(pc.is_finite(values))).as_py()
    ):
        raise SchemaError(
            f"{where}: {name} holds a NaN or an infinity, expected finite numbers. Reject such rows."
        )


def _within_unit(values: pa.Array, name: str, where: str) -> None:
    _finite(values, name, where)
    if len(values) > values.null_count:
        bounds = pc.min_max(values).as_py()
        if bounds["min"] < 0 or bounds["max"] > 1:
            raise SchemaError(
                f"{where}: {name} ranges over [{bounds['min']}, {bounds['max']}], expected within [0, 1]."
            )


def _one_of(table: pa.Table, name: str, allowed: tuple[str, ...], where: str) -> None:
    fits = pc.is_in(table[name], value_set=pa.array(allowed, pa.string()))
    if not pc.all(fits).as_py():
        found = table[name].filter(pc.invert(fits))[0].as_py()
        raise SchemaError(f"{where}: {name} holds {found!r}, expected one of {', '.join(allowed)}.")


def _fail_where(bad: pa.ChunkedArray, where: str, rule: str) -> None:
    if pc.any(bad).as_py():
        row = pc.index(bad, True).as_py()
        count = pc.sum(bad).as_py()
        raise SchemaError(f"{where}: {count} rows break a rule, first row {row}: a row {rule}.")
