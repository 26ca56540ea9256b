"""Inspections as a person reads them in a terminal of 80 columns or more; `--json` has everything that is left out here."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from flows.views.inspect.summary import QUANTILES
from flows.views.inspect.text import one_line, visible
from flows.views.show import size_text

__all__ = ["print_diff", "print_inspection", "print_prompt"]

_BARS = " ▁▂▃▄▅▆▇█"
_MOST_TEXT = 4000  # characters of one message


def print_inspection(shown: dict[str, Any], console: Console) -> None:
    """An artifact: what it is, its columns and numbers, then rows as conversations."""
    head = f"{shown['stage']} of run {shown['run']}: {shown['rows']:,} rows, {shown['rejects']:,} rejects, {size_text(shown['bytes'])}"
    console.print(head, style="bold")
    made = [f"{shown['stage']} {shown['fingerprint'][:12]}"]
    made += [f"{step['stage']} {step['fingerprint'][:12]}" for step in shown["lineage"]]
    console.print("made from: " + " <- ".join(made))
    for reason, count in shown["reject_reasons"].items():
        console.print(f"  {count}x {visible(reason)}", style="yellow")
    if not shown["columns"]:
        console.print_json(json.dumps(shown.get("metadata", {}), default=str))
        return
    columns = Table("column", "type", Column("nulls", justify="right"), box=SIMPLE)
    for column, kind in shown["columns"].items():
        nulls = shown["nulls"].get(column)
        columns.add_row(visible(column), kind, "?" if nulls is None else f"{nulls:,}")
    console.print(columns)
    _print_numbers(shown["numbers"], console)
    if "matches" in shown and shown["matches"] != shown["rows"]:
        console.print(_matches(shown), style="bold")
    chats = shown.get("conversations") or [{}] * len(shown["samples"])
    for row, chat in zip(shown["samples"], chats, strict=True):
        console.print(_row_panel(row, chat))


def print_prompt(followed: dict[str, Any], console: Console) -> None:
    """One prompt: the conversation, its completions by reward, what was left out, and the rows of the later stages."""
    console.print(f"prompt {followed['prompt_id']} of run {followed['run']}", style="bold")
    if followed["prompt"] is not None:
        console.print(_row_panel(followed["prompt"], {}))
    console.print(_completions("completions by reward", followed["completions"]))
    if followed["samples"]:
        console.print(_completions("evaluation, fresh samples by reward", followed["samples"]))
    for reject in followed["rejects"]:
        line = f"left out by {reject['stage']}: {reject['key']}: {reject['reason']}"
        console.print(visible(line), style="yellow")
    for stage in ("quantiles", "shards"):
        for row in followed["stages"].get(stage, ()):
            console.print(_row_panel(row, {}, title=stage))


def print_diff(shown: dict[str, Any], names: Sequence[str], console: Console) -> None:
    """Two runs' artifacts of one stage."""
    old, new = names
    console.print(
        f"{shown['stage']}: {old} ({shown['rows'][0]:,} rows) to {new} ({shown['rows'][1]:,} rows)",
        style="bold",
    )
    counts = ", ".join(f"{shown[what]:,} {what}" for what in ("same", "changed", "added", "removed"))
    console.print(counts)
    for column, count in shown["changed_columns"].items():
        console.print(f"  {visible(column)} changed in {count:,} rows")
    table = Table(Column("number", overflow="fold"), "mean", "median", "distribution", box=SIMPLE)
    for column in dict.fromkeys([*shown["numbers"][0], *shown["numbers"][1]]):
        for name, side in zip(names, shown["numbers"], strict=True):
            known = side.get(column)
            if known is not None:
                label = f"{visible(column)} ({name})"
                median = known["quantiles"][QUANTILES.index(0.5)]
                table.add_row(
                    label, f"{known['mean']:.4g}", f"{median:.4g}", _bars(known["histogram"]["counts"])
                )
        table.add_section()
    if table.row_count:
        console.print(table)
    for what, rows in shown["examples"].items():
        for row in rows[:5]:
            console.print(_change_panel(row) if what == "changed" else _row_panel(row, {}, title=what))


def _print_numbers(numbers: Mapping[str, Any], console: Console) -> None:
    table = Table(Column("number", overflow="fold", min_width=14), box=SIMPLE)
    for name in ("mean", "least", "median", "most"):
        table.add_column(name, no_wrap=True)
    table.add_column("distribution", no_wrap=True)
    for column, known in numbers.items():
        least, median, most = (known["quantiles"][QUANTILES.index(share)] for share in (0.0, 0.5, 1.0))
        values = (f"{value + 0.0:.4g}" for value in (known["mean"], least, median, most))  # + 0.0: no "-0"
        table.add_row(visible(column), *values, _bars(known["histogram"]["counts"]))
    if table.row_count:
        console.print(table)
    estimates = {known.get("estimated_from") for known in numbers.values()} - {None}
    if estimates:
        rows = " and ".join(f"{count:,}" for count in sorted(estimates))
        exact = all(known["exact_extremes"] for known in numbers.values() if "exact_extremes" in known)
        console.print(
            f"{'least and most are exact, the rest is' if exact else 'all numbers are'} estimated from {rows} rows spread "
            "over the artifact; --exact reads all\n"
        )


def _matches(shown: Mapping[str, Any]) -> str:
    if shown["matches"] is not None:
        return f"{shown['matches']:,} rows match"
    return f"the first matches among {shown['searched']:,} of {shown['rows']:,} rows; there was no time to look at all"


def _bars(counts: Sequence[int], width: int = 16) -> str:
    if len(counts) > width:  # pairs of bins
        step = len(counts) // width
        counts = [sum(counts[place : place + step]) for place in range(0, len(counts), step)]
    most = max(counts)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)


def _completions(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("origin", "sample", "reward", "quantile", "completion", title=title, title_justify="left")
    for row in rows:
        text = Text(_cut(row["text"]), no_wrap=False, overflow="fold")
        if row["became"]:
            text.append(f"\n{visible(row['became'])}", style="dim")
        if row["error"]:
            text.append(f"\n{visible(row['error'])}", style="yellow")
        quantile = row["quantile_reward"] if row["quantile_reward"] is not None else row["rank"]
        table.add_row(
            visible(str(row["origin"])),
            str(row["sample_index"]),
            "" if row["reward"] is None else f"{row['reward']:.4g}",
            "" if quantile is None else f"{quantile:.3f}",
            text,
        )
    return table


def _row_panel(row: Mapping[str, Any], chat: Mapping[str, Any], title: str | None = None) -> Panel:
    """A row: its conversation first, then every other column."""
    text = Text(no_wrap=False, overflow="fold")  # the console itself folds nothing
    messages = row.get("messages") or chat.get("messages") or ()
    completion = row.get("text") if "text" in row else chat.get("completion")
    for message in messages:
        _speak(text, message["role"], message["content"])
    if completion is not None:
        _speak(text, "completion", completion)
    for name, value in row.items():
        if name not in ("messages", "text"):
            text.append(f"{visible(name)}: ", style="bold")
            text.append(f"{one_line(value)}\n")
    text.rstrip()
    return Panel(text, expand=False, title=title, title_align="left")


def _change_panel(row: Mapping[str, Any]) -> Panel:
    text = Text(no_wrap=False, overflow="fold")  # the console itself folds nothing
    for name, value in row.items():
        if name != "changes":
            text.append(f"{visible(name)}: ", style="bold")
            text.append(f"{one_line(value)}\n")
    for name, (before, after) in row["changes"].items():
        text.append(f"{visible(name)}\n", style="bold")
        text.append(f"- {one_line(before)}\n", style="red")
        text.append(f"+ {one_line(after)}\n", style="green")
    text.rstrip()
    return Panel(text, expand=False, title="changed", title_align="left")


def _speak(text: Text, role: str, content: str) -> None:
    text.append(f"[{visible(role)}] ", style="cyan")
    text.append(f"{_cut(content)}\n")


def _cut(text: str) -> str:
    shown = visible(text[:_MOST_TEXT])
    return shown if len(text) <= _MOST_TEXT else f"{shown} ... ({len(text):,} characters)"
