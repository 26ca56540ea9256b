"""The same stage of two runs: rows added, removed and changed, and how the numbers moved.

Parts that both artifacts share by digest are equal without being read. Of the others, keys first, then one column at a time.
"""

from collections.abc import Sequence
from typing import Any

import polars as pl

from flows.views.inspect.rows import Rows
from flows.views.inspect.summary import summarise
from qrpo.errors import DataError
from storage import Manifest, PartRecord, Store

__all__ = ["diff_stage"]

_MOST_ROWS = 20_000_000


def diff_stage(
    store: Store, before: Manifest, after: Manifest, *, limit: int = 20, most_rows: int = _MOST_ROWS
) -> dict[str, Any]:
    """Counts, the first `limit` changed rows with both values of what changed, and the numbers of both sides.

    Raises DataError for a stage whose rows have no key.
    """
    from tasks.stages import TABLES  # slow to import, and no other view of `inspect` needs it

    stage = before.stage
    if stage not in TABLES:
        raise DataError(f"rows of {stage} have no key to compare them by; {', '.join(TABLES)} have")
    keys = list(TABLES[stage].key)
    old, new = (Rows(store, parts) for parts in _differing(before, after))
    if len(old) + len(new) > most_rows:
        raise DataError(
            f"{len(old) + len(new):,} rows lie in parts that differ; at most {most_rows:,} can be compared here"
        )
    shared = before.rows - len(old)
    counts: dict[str, int] = {}
    frames = [_keys(rows, keys) for rows in (old, new)]
    both = frames[0].join(frames[1], on=keys, how="inner", suffix="_new", maintain_order="left")
    changed = pl.Series([False] * both.height, dtype=pl.Boolean)
    for column in _common(old, new, keys) if both.height else ():
        differs = _column(old, column)[both["row"]].ne_missing(_column(new, column)[both["row_new"]])
        if moved := int(differs.sum()):
            counts[column] = moved
            changed = changed | differs
    return {
        "stage": stage,
        "before": before.fingerprint,
        "after": after.fingerprint,
        "rows": [before.rows, after.rows],
        "same": shared + both.height - int(changed.sum()),
        "changed": int(changed.sum()),
        "removed": frames[0].height - both.height,
        "added": frames[1].height - both.height,
        "changed_columns": counts,
        "columns_only_before": []
        if not len(old) or not len(new)
        else [c for c in old.schema if c not in new.schema],
        "columns_only_after": []
        if not len(old) or not len(new)
        else [c for c in new.schema if c not in old.schema],
        "examples": {
            "changed": _pairs(old, new, both.filter(changed).head(limit), keys, list(counts)),
            "removed": _rows(
                old, frames[0].join(frames[1], on=keys, how="anti", maintain_order="left").head(limit)
            ),
            "added": _rows(
                new, frames[1].join(frames[0], on=keys, how="anti", maintain_order="left").head(limit)
            ),
        },
        "numbers": [
            summarise(Rows(store, manifest.parts)) if manifest.rows else {} for manifest in (before, after)
        ],
    }


def _differing(before: Manifest, after: Manifest) -> tuple[list[PartRecord], list[PartRecord]]:
    shared = {part.digest for part in before.parts} & {part.digest for part in after.parts}
    old, new = (
        [part for part in manifest.parts if part.digest not in shared] for manifest in (before, after)
    )
    return old, new


def _keys(rows: Rows, keys: Sequence[str]) -> pl.DataFrame:
    if not len(rows):
        schema = {key: pl.Int32 if key == "sample_index" else pl.String for key in keys}
        return pl.DataFrame(schema=schema | {"row": pl.UInt32})
    return pl.concat([chunk.frame for chunk in rows.scan(keys)]).with_row_index("row")


def _common(old: Rows, new: Rows, keys: Sequence[str]) -> list[str]:
    return [name for name in old.schema if name in new.schema and name not in keys]


def _column(rows: Rows, name: str) -> pl.Series:
    return pl.concat([chunk.frame for chunk in rows.scan([name])])[name]


def _rows(rows: Rows, frame: pl.DataFrame) -> list[dict[str, Any]]:
    return rows.take(frame["row"].to_list()).to_dicts() if frame.height else []


def _pairs(
    old: Rows, new: Rows, both: pl.DataFrame, keys: Sequence[str], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The keys of each row, and of every column that changed in it the values before and after."""
    if not both.height:
        return []
    wanted = [*keys, *columns]
    befores = old.take(both["row"].to_list(), wanted).to_dicts()
    afters = new.take(both["row_new"].to_list(), wanted).to_dicts()
    return [
        {key: one[key] for key in keys}
        | {"changes": {name: [one[name], other[name]] for name in columns if one[name] != other[name]}}
        for one, other in zip(befores, afters, strict=True)
    ]
