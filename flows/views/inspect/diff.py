"""The same stage of two runs: rows added, removed and changed, and how the numbers moved.

Parts with the same digest in both artifacts are equal and are not read. Of the others the keys are
compared first, then one column at a time.
"""

from collections.abc import Sequence
from typing import Any

import polars as pl

from flows.views.inspect.rows import ArtifactRows
from flows.views.inspect.summary import summarise
from qrpo.errors import DataError
from storage import Manifest, Store

_MAX_ROWS = 20_000_000


def diff_stage(
    store: Store, before: Manifest, after: Manifest, *, limit: int = 20, max_rows: int = _MAX_ROWS
) -> dict[str, Any]:
    """Counts, the first `limit` changed rows with both values of what changed, and the numbers of
    both sides.

    Raises DataError for a stage whose rows have no key, or if more than `max_rows` rows differ.
    """
    from tasks.stages import TABLES  # slow to import, and no other view of `inspect` needs it

    stage = before.stage
    if stage not in TABLES:
        raise DataError(f"rows of {stage} have no key to compare them by; {', '.join(TABLES)} have")
    keys = list(TABLES[stage].key)
    shared = {part.digest for part in before.parts} & {part.digest for part in after.parts}
    old, new = (
        ArtifactRows(store, [part for part in manifest.parts if part.digest not in shared])
        for manifest in (before, after)
    )
    if len(old) + len(new) > max_rows:
        raise DataError(
            f"{len(old) + len(new):,} rows are in parts that differ; at most {max_rows:,} can be compared here"
        )
    names = [list(side.schema) if len(side) else [] for side in (old, new)]
    kinds = pl.Schema(TABLES[stage].schema)
    old_keys, new_keys = (_read(side, keys, kinds).with_row_index("row") for side in (old, new))
    both = old_keys.join(new_keys, on=keys, suffix="_new", maintain_order="left")
    removed = old_keys.join(new_keys, on=keys, how="anti", maintain_order="left")
    added = new_keys.join(old_keys, on=keys, how="anti", maintain_order="left")
    counts: dict[str, int] = {}
    changed = pl.repeat(False, both.height, eager=True)
    for name in [name for name in names[0] if name in names[1] and name not in keys and both.height]:
        theirs, ours = (_read(side, [name], side.schema)[name] for side in (old, new))
        differs = theirs[both["row"]].ne_missing(ours[both["row_new"]])
        if moved := int(differs.sum()):
            counts[name] = moved
            changed = changed | differs
    moved = int(changed.sum())
    return {
        "stage": stage,
        "before": before.fingerprint,
        "after": after.fingerprint,
        "rows": [before.rows, after.rows],
        "same": before.rows - len(old) + both.height - moved,
        "changed": moved,
        "removed": removed.height,
        "added": added.height,
        "changed_columns": counts,
        "columns_only_before": [name for name in names[0] if names[1] and name not in names[1]],
        "columns_only_after": [name for name in names[1] if names[0] and name not in names[0]],
        "examples": {
            "changed": _changes(old, new, both.filter(changed).head(limit), keys, list(counts)),
            "removed": _take(old, removed["row"].head(limit)),
            "added": _take(new, added["row"].head(limit)),
        },
        "numbers": [summarise(ArtifactRows(store, manifest.parts)) for manifest in (before, after)],
    }


def _read(rows: ArtifactRows, columns: Sequence[str], kinds: pl.Schema) -> pl.DataFrame:
    """Columns of all rows; of these types where there are no rows."""
    frames = [frame for _, frame in rows.scan(columns)]
    return pl.concat(frames) if frames else pl.DataFrame(schema={name: kinds[name] for name in columns})


def _take(
    rows: ArtifactRows, positions: pl.Series, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    return rows.take(positions.to_list(), columns).to_dicts() if len(positions) else []


def _changes(
    old: ArtifactRows, new: ArtifactRows, both: pl.DataFrame, keys: Sequence[str], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The keys of each row, and both values of every column that changed in it."""
    wanted = [*keys, *columns]
    sides = zip(_take(old, both["row"], wanted), _take(new, both["row_new"], wanted), strict=True)
    return [
        {key: one[key] for key in keys}
        | {"changes": {name: [one[name], other[name]] for name in columns if one[name] != other[name]}}
        for one, other in sides
    ]
