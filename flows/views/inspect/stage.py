"""One artifact: schema, sizes, lineage, nulls, rejects, numbers, and rows of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from flows.views.inspect.lookup import RunData
from flows.views.inspect.query import Query, condition_of, find_rows
from flows.views.inspect.rows import Rows, rows_of
from flows.views.inspect.summary import column_nulls, numbers_of, summarise
from flows.views.show import lineage
from storage import Manifest, PartRecord, Store

__all__ = ["conversations", "inspect_stage", "reject_reasons", "training_metrics"]


def inspect_stage(
    store: Store,
    run: str,
    manifest: Manifest,
    query: Query,
    *,
    columns: Sequence[str] | None,
    limit: int,
    exact: bool = False,
) -> dict[str, Any]:
    """What `qrpo inspect` prints: the artifact, its numbers (of the rows that match), and `limit` rows.

    `exact` reads every row where else a part of them would be enough for an estimate. `samples` are the rows as stored; `conversations` holds, for each, the prompt's messages and the completion where there are any.
    """
    data = RunData(store, run, [manifest])
    shown: dict[str, Any] = {
        "run": run,
        "stage": manifest.stage,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "rejects": manifest.rejects,
        "reject_reasons": reject_reasons(store, manifest),
        "lineage": lineage(data.manifest, manifest),
        "columns": {},
        "nulls": {},
        "numbers": {},
        "samples": [],
    }
    rows = rows_of(store, manifest)
    if rows is None:
        metrics = training_metrics(store, manifest)
        if metrics is None:
            return shown | {"metadata": dict(manifest.metadata)}
        return shown | _of_frame(metrics, columns, limit)
    names = rows.check_columns(columns) if columns else list(rows.schema)
    shown["columns"] = {name: str(rows.schema[name]) for name in names}
    shown["nulls"] = {name: count for name, count in column_nulls(rows, exact=exact).items() if name in names}
    shown["numbers"] = summarise(rows, columns=names, condition=condition_of(rows, query), exact=exact)
    found = find_rows(rows, query, limit=limit)
    shown["matches"], shown["searched"] = found.matches, found.searched
    shown["samples"] = rows.take(found.positions, names).to_dicts()
    parts = [rows.place(position)[0] for position in found.positions]
    shown["conversations"] = conversations(data, rows, found.positions, parts)
    return shown


def conversations(
    data: RunData, rows: Rows, positions: Sequence[int], parts: Sequence[PartRecord]
) -> list[dict[str, Any]]:
    """For each row, the `messages` of its prompt and the `completion` that it is about, where there are such."""
    keys = [
        name for name in ("prompt_id", "origin", "sample_index", "messages", "text") if name in rows.schema
    ]
    if "prompt_id" not in keys or not positions:
        return [{} for _ in positions]
    one = {name for name in keys if not rows.schema[name].is_nested()} | ({"messages"} & set(keys))
    own = rows.take(positions, [name for name in keys if name in one]).to_dicts()
    for row, part in zip(own, parts, strict=True):
        data.note_home(row["prompt_id"], part)
    ids = {row["prompt_id"] for row in own}
    messages = {}
    if "messages" not in one:
        messages = {
            row["prompt_id"]: row["messages"] for row in data.rows("prompts", ids, ["prompt_id", "messages"])
        }
    texts: Mapping[Any, str] = {}
    if "text" not in one and "sample_index" in one and "origin" in one:
        wanted = ["prompt_id", "origin", "sample_index", "text"]
        texts = {_key(row): row["text"] for row in data.rows("completions", ids, wanted)}
    return [
        {
            "messages": row.get("messages") or messages.get(row["prompt_id"]),
            "completion": row["text"] if "text" in row else texts.get(_key(row)),
        }
        for row in own
    ]


def training_metrics(store: Store, manifest: Manifest) -> pl.DataFrame | None:
    """The rows that a training run logged, one a step; None where there are none."""
    for record in manifest.parts:
        for file in record.payload:
            if file.name == "metrics.parquet":
                with store.open_input(file.key) as opened:
                    return pl.read_parquet(opened)
    return None


def reject_reasons(store: Store, manifest: Manifest, most: int = 10) -> dict[str, int]:
    """How often each reason for leaving a row out was given, the most frequent first."""
    counts: dict[str, int] = {}
    for record in manifest.parts:
        if record.rejects:
            for reason in store.read_rejects(record)["reason"].to_pylist():
                counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:most])


def _of_frame(frame: pl.DataFrame, columns: Sequence[str] | None, limit: int) -> dict[str, Any]:
    names = [name for name in frame.columns if columns is None or name in columns]
    return {
        "columns": {name: str(frame.schema[name]) for name in names},
        "nulls": {name: frame[name].null_count() for name in names},
        "numbers": {name: known for name in names if (known := numbers_of(frame[name])) is not None},
        "samples": frame.select(names).head(limit).to_dicts(),
    }


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["prompt_id"], row.get("origin"), row.get("sample_index")
