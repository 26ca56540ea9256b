"""`qrpo inspect`: the rows of a stage, their distributions and rejects, or one prompt through every stage."""

import json
from typing import Any

import polars as pl
import pyarrow.compute as pc
from rich.box import SIMPLE
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from flows.show import find_manifest, run_name, size_text, stages_of
from qrpo.errors import DataError
from storage import Manifest, Store

__all__ = ["follow_prompt", "inspect_stage", "print_inspection", "print_prompt"]

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_BARS = " ▁▂▃▄▅▆▇█"


def inspect_stage(store: Store, name: str, stage: str, limit: int) -> dict[str, Any]:
    """Columns, numbers and rejects of a stage's artifact, and its first `limit` rows."""
    manifest = find_manifest(store, run_name(name), stage)
    shown: dict[str, Any] = {
        "run": run_name(name),
        "stage": stage,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "rejects": manifest.rejects,
        "reject_reasons": _reject_reasons(store, manifest),
        "columns": {},
        "numbers": {},
        "samples": [],
    }
    frame = _lazy(store, manifest)
    if frame is None:
        frame = _training_metrics(store, manifest)
    if frame is None:
        shown["metadata"] = dict(manifest.metadata)
        return shown
    schema = frame.collect_schema()
    shown["columns"] = {column: str(kind) for column, kind in schema.items()}
    shown["numbers"] = {column: _numbers(frame, column) for column in _numeric(schema)}
    shown["samples"] = frame.head(limit).collect().to_dicts()
    return shown


def follow_prompt(store: Store, name: str, prompt_id: str) -> dict[str, Any]:
    """Every row that any stage of the run has of one prompt, by stage; the id may be shortened to a unique beginning."""
    run = run_name(name)
    noted = store.run(run) or {}
    found: dict[str, Any] = {}
    for stage in stages_of(noted):
        frame = _lazy(store, find_manifest(store, run, stage))
        if frame is not None:
            found[stage] = frame.filter(pl.col("prompt_id").str.starts_with(prompt_id)).collect().to_dicts()
    ids = {row["prompt_id"] for rows in found.values() for row in rows}
    if not ids:
        raise DataError(
            f"no prompt of run {run!r} has an id that begins with {prompt_id!r}; `qrpo inspect {run} prompts` shows ids"
        )
    if len(ids) > 1:
        raise DataError(
            f"{len(ids)} prompts have ids that begin with {prompt_id!r}: {', '.join(sorted(ids)[:5])} ...; give more of it"
        )
    return {"run": run, "prompt_id": ids.pop(), "stages": found}


def print_inspection(shown: dict[str, Any], console: Console) -> None:
    """The inspection as a person reads it."""
    head = f"{shown['stage']} of run {shown['run']}: {shown['rows']:,} rows, {shown['rejects']:,} rejects, {size_text(shown['bytes'])}"
    console.print(head, style="bold")
    for reason, count in shown["reject_reasons"].items():
        console.print(f"  {count}x {_visible(reason)}", style="yellow")
    if not shown["columns"]:
        console.print_json(json.dumps(shown["metadata"], default=str))
        return
    columns = Table("column", "type", box=SIMPLE)
    for column, kind in shown["columns"].items():
        columns.add_row(column, kind)
    console.print(columns)
    # no wider than a terminal of 80 columns; --json has more quantiles
    numbers = Table(Column("number", overflow="fold"), "mean", "least", "median", "most", box=SIMPLE)
    numbers.add_column("distribution", no_wrap=True)
    for column, known in shown["numbers"].items():
        if known is not None:
            least, median, most = (known["quantiles"][_QUANTILES.index(q)] for q in (0.0, 0.5, 1.0))
            values = (f"{value:.4g}" for value in (known["mean"], least, median, most))
            numbers.add_row(column, *values, known["histogram"])
    if numbers.row_count:
        console.print(numbers)
    for row in shown["samples"]:
        console.print(_row_panel(row))


def print_prompt(followed: dict[str, Any], console: Console) -> None:
    """One prompt through the stages as a person reads it: the conversation, then its completions by reward."""
    stages = followed["stages"]
    console.print(f"prompt {followed['prompt_id']} of run {followed['run']}", style="bold")
    for prompt in stages.get("prompts", ()):
        console.print(_row_panel(prompt))
    rewards = {(r["origin"], r["sample_index"]): r for r in stages.get("rewards", ())}
    quantiles = {
        (origin, index): quantile
        for row in stages.get("quantiles", ())
        for origin, index, quantile in zip(
            row["origin"], row["sample_index"], row["quantile_reward"], strict=True
        )
    }
    table = Table(
        "origin",
        "sample",
        "reward",
        "quantile",
        "completion",
        title="completions by reward",
        title_justify="left",
    )

    def order(row: dict[str, Any]) -> float:
        reward = rewards.get((row["origin"], row["sample_index"]), {}).get("reward")
        return float("inf") if reward is None else -float(reward)

    for row in sorted(stages.get("completions", ()), key=order):
        key = row["origin"], row["sample_index"]
        reward = rewards.get(key, {}).get("reward")
        quantile = quantiles.get(key)
        table.add_row(
            row["origin"],
            str(row["sample_index"]),
            "" if reward is None else f"{reward:.4g}",
            "" if quantile is None else f"{quantile:.3f}",
            Text(_visible(row["text"])),
        )
    console.print(table)
    for stage in ("quantiles", "shards", "evaluation"):
        for row in stages.get(stage, ()):
            console.print(stage, style="bold")
            console.print(_row_panel(row))


def _lazy(store: Store, manifest: Manifest) -> pl.LazyFrame | None:
    records = [record for record in manifest.parts if record.table is not None]
    return store.scan(records) if records else None


def _training_metrics(store: Store, manifest: Manifest) -> pl.LazyFrame | None:
    """The rows that a training run logged, one a step."""
    for record in manifest.parts:
        for file in record.payload:
            if file.name == "metrics.parquet":
                with store.open_input(file.key) as opened:
                    return pl.read_parquet(opened).lazy()
    return None


def _reject_reasons(store: Store, manifest: Manifest, most: int = 10) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in manifest.parts:
        if record.rejects:
            for reason in store.read_rejects(record)["reason"].to_pylist():
                counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:most])


def _numeric(schema: pl.Schema) -> list[str]:
    def numeric(kind: pl.DataType) -> bool:
        return kind.is_numeric() or (isinstance(kind, pl.List) and numeric(kind.inner))  # type: ignore[arg-type]

    return [name for name, kind in schema.items() if numeric(kind) and "token_ids" not in name]


def _numbers(frame: pl.LazyFrame, column: str) -> dict[str, Any] | None:
    values = frame.select(pl.col(column)).collect()[column]
    while isinstance(values.dtype, pl.List):
        values = pl.Series(pc.list_flatten(values.to_arrow()))
    values = values.drop_nulls().cast(pl.Float64)
    if values.is_empty():
        return None
    low, high = float(values.min()), float(values.max())  # type: ignore[arg-type]
    return {
        "count": len(values),
        "mean": values.mean(),
        "quantiles": [values.quantile(q, "linear") for q in _QUANTILES],
        "histogram": _histogram(values, low, high),
    }


def _histogram(values: pl.Series, low: float, high: float, bins: int = 16) -> str:
    if high <= low:
        return _BARS[-1]
    index = ((values - low) / (high - low) * bins).floor().clip(0, bins - 1).cast(pl.Int32)
    counts = dict(index.value_counts().iter_rows())
    most = max(counts.values())
    return "".join(_BARS[-(-counts.get(place, 0) * (len(_BARS) - 1) // most)] for place in range(bins))


def _row_panel(row: dict[str, Any]) -> Panel:
    text = Text()
    for name, value in row.items():
        text.append(f"{name}: ", style="bold")
        if name == "messages":
            for message in value:
                text.append(f"\n  [{message['role']}] ", style="cyan")
                text.append(_visible(message["content"]))
        else:
            text.append(_short(value))
        text.append("\n")
    return Panel(text, expand=False)


def _short(value: Any, most: int = 400) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and value and isinstance(value[0], float):
        value = "[" + ", ".join(f"{item:.4g}" for item in value) + "]"
    text = _visible(str(value))
    return text if len(text) <= most else f"{text[:most]} ... ({len(text)} characters)"


def _visible(text: str) -> str:
    """The text with control characters written out: what a model wrote must not command the terminal."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )
