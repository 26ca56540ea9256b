"""One artifact: schema, sizes, lineage, nulls, rejects, numbers, and rows of it."""

from typing import Any

import polars as pl

from flows.views.inspect.lookup import PromptLookup
from flows.views.inspect.rows import ArtifactRows, Query, condition_of, find_rows
from flows.views.inspect.summary import column_nulls, summarise
from storage import Manifest, Store
from tasks.artifact_summary import numbers_of, reject_reasons, training_metrics


def inspect_stage(run: PromptLookup, stage: str, query: Query, *, exact: bool = False) -> dict[str, Any]:
    """What `qrpo inspect` prints: the artifact, its numbers (of the rows that match), and rows.

    `exact` reads every row where a sample would be enough for an estimate. `samples` are the rows
    as stored; `conversations` has, for each, the prompt's messages and the completion if there are
    any.
    """
    manifest = run.manifest(stage)
    shown: dict[str, Any] = {
        "run": run.run,
        "stage": stage,
        **{key: getattr(manifest, key) for key in ("fingerprint", "rows", "bytes", "rejects")},
        "reject_reasons": reject_reasons(run.store, manifest),
        "note": manifest.metadata.get("note"),
        "lineage": run.lineage(manifest),
    }
    rows = ArtifactRows(run.store, manifest.parts)
    if not rows.parts:
        return shown | metrics_of(run.store, manifest, query) | {"metadata": dict(manifest.metadata)}
    names = rows.chosen(query)
    nulls = column_nulls(rows, exact=exact)
    condition = condition_of(rows, query)
    found = find_rows(rows, query)
    return shown | {
        "columns": {name: str(rows.schema[name]) for name in names},
        "nulls": {name: nulls[name] for name in rows.schema if name in names},
        "numbers": summarise(rows, columns=names, condition=condition, exact=exact),
        "matches": found.matches,
        "searched": found.searched,
        "samples": rows.take(found.positions, names).to_dicts(),
        "conversations": run.conversations(rows, found.positions),
    }


def metrics_of(store: Store, manifest: Manifest, query: Query) -> dict[str, Any]:
    """The same of what a training run logged, one row per logged step; empty for a folder of
    something else."""
    found = training_metrics(store, manifest)
    frame = pl.DataFrame() if found is None else found
    frame = frame.select(name for name in frame.columns if name in (query.columns or frame.columns))
    numbers = {name: numbers_of(frame[name]) for name in frame.columns}
    return {
        "columns": {name: str(kind) for name, kind in frame.schema.items()},
        "nulls": {name: frame[name].null_count() for name in frame.columns},
        "numbers": {name: known for name, known in numbers.items() if known is not None},
        "samples": frame.head(query.limit or frame.height).to_dicts(),
    }
