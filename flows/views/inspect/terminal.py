"""`qrpo inspect` in a terminal of 80 columns or more. `--json` has everything that is cut here."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.json import JSON
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from flows.views.runs import size_text
from flows.views.text import one_line, visible
from tasks.artifact_summary import QUANTILES

_BARS = " ▁▂▃▄▅▆▇█"
_MAX_TEXT = 4000  # characters of one message


def inspection(shown: dict[str, Any]) -> Group:
    """An artifact: its size and lineage, columns and numbers, then rows as conversations."""
    counts = f"{shown['rows']:,} rows, {shown['rejects']:,} rejects, {size_text(shown['bytes'])}"
    steps = [f"{step['stage']} {step['fingerprint'][:12]}" for step in (shown, *shown["lineage"])]
    head: list[Any] = [
        Text(f"{shown['stage']} of run {shown['run']}: {counts}", style="bold"),
        "made from: " + " <- ".join(steps),
        *(Text(f"  {n}x {visible(reason)}", style="yellow") for reason, n in shown["reject_reasons"].items()),
        *([Text(visible(shown["note"]), style="yellow")] if shown["note"] else []),
    ]
    if not shown["columns"]:
        return Group(*head, JSON.from_data(shown.get("metadata", {}), default=str))
    columns = Table("column", "type", Column("nulls", justify="right"), box=SIMPLE)
    for column, kind in shown["columns"].items():
        nulls = shown["nulls"].get(column)
        columns.add_row(visible(column), kind, "?" if nulls is None else f"{nulls:,}")
    chats = shown.get("conversations") or [{}] * len(shown["samples"])
    rows = [_row(row, chat) for row, chat in zip(shown["samples"], chats, strict=True)]
    return Group(*head, columns, *_numbers(shown["numbers"]), *_matches(shown), *rows)


def prompt(followed: dict[str, Any]) -> Group:
    """One prompt: the conversation, its completions by reward, rejects, and the rows of the later
    stages."""
    parts: list[Any] = [Text(f"prompt {followed['prompt_id']} of run {followed['run']}", style="bold")]
    if followed["prompt"] is not None:
        parts.append(_row(followed["prompt"]))
    parts.append(_completions("completions by reward", followed["completions"]))
    if followed["samples"]:
        parts.append(_completions("evaluation, fresh samples by reward", followed["samples"]))
    for reject in followed["rejects"]:
        line = f"rejected by {reject['stage']}: {reject['key']}: {reject['reason']}"
        parts.append(Text(visible(line), style="yellow"))
    for stage in ("quantiles", "shards"):
        parts += [_row(row, title=stage) for row in followed["stages"].get(stage, ())]
    return Group(*parts)


def diff(shown: dict[str, Any]) -> Group:
    """One stage of two runs."""
    sides = [f"{name} ({rows:,} rows)" for name, rows in zip(shown["runs"], shown["rows"], strict=True)]
    changed = shown["changed_columns"].items()
    table = Table(Column("number", overflow="fold"), "mean", "median", "distribution", box=SIMPLE)
    for column in dict.fromkeys([*shown["numbers"][0], *shown["numbers"][1]]):
        for name, side in zip(shown["runs"], shown["numbers"], strict=True):
            if column in side:
                label = f"{visible(column)} ({name})"
                table.add_row(label, *_values(side[column], "mean", 0.5), _bars(side[column]))
        table.add_section()
    return Group(
        Text(f"{shown['stage']}: {' to '.join(sides)}", style="bold"),
        ", ".join(f"{shown[what]:,} {what}" for what in ("same", "changed", "added", "removed")),
        *(f"  {visible(column)} changed in {count:,} rows" for column, count in changed),
        *([table] if table.row_count else []),
        *(_row(row, title=what) for what, rows in shown["examples"].items() for row in rows[:5]),
    )


def _matches(shown: Mapping[str, Any]) -> Iterator[Text]:
    matches, rows = shown.get("matches", shown["rows"]), shown["rows"]
    if matches is None:
        searched = f"{shown['searched']:,} of {rows:,} rows"
        yield Text(f"the first matches among {searched}; time ran out before the rest", style="bold")
    elif matches != rows:
        yield Text(f"{matches:,} rows match", style="bold")


def _numbers(numbers: Mapping[str, Any]) -> Iterator[Any]:
    table = Table(Column("number", overflow="fold", min_width=14), box=SIMPLE)
    for name in ("mean", "min", "median", "max", "distribution"):
        table.add_column(name, no_wrap=True)
    for column, known in numbers.items():
        table.add_row(visible(column), *_values(known, "mean", 0.0, 0.5, 1.0), _bars(known))
    if table.row_count:
        yield table
    estimates = {known.get("estimated_from") for known in numbers.values()} - {None}
    if estimates:
        rows = " and ".join(f"{count:,}" for count in sorted(estimates))
        exact = all(known.get("exact_extremes", True) for known in numbers.values())
        which = "min and max are exact, the rest is" if exact else "all numbers are"
        yield f"{which} estimated from {rows} rows spread over the artifact; --exact reads all\n"


def _values(known: Mapping[str, Any], *which: str | float) -> list[str]:
    """A named number or a quantile each, as text."""
    values = (
        known[key] if isinstance(key, str) else known["quantiles"][QUANTILES.index(key)] for key in which
    )
    return [f"{value + 0.0:.4g}" for value in values]  # + 0.0: no "-0"


def _bars(known: Mapping[str, Any], width: int = 16) -> str:
    counts = known["histogram"]["counts"]
    step = max(1, len(counts) // width)
    counts = [sum(counts[place : place + step]) for place in range(0, len(counts), step)]
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // max(counts))] for count in counts)


def _completions(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("origin", "sample", "reward", "quantile", "completion", title=title, title_justify="left")
    for row in rows:
        text = Text(_cut(row["text"]), no_wrap=False, overflow="fold")
        for key, style in (("became", "dim"), ("error", "yellow")):
            if row[key]:
                text.append(f"\n{visible(row[key])}", style=style)
        quantile = row["quantile_reward"] if row["quantile_reward"] is not None else row["rank"]
        reward = "" if row["reward"] is None else f"{row['reward']:.4g}"
        shown = "" if quantile is None else f"{quantile:.3f}"
        table.add_row(visible(str(row["origin"])), str(row["sample_index"]), reward, shown, text)
    return table


def _row(row: Mapping[str, Any], chat: Mapping[str, Any] | None = None, title: str | None = None) -> Panel:
    """A row: its conversation first, then every other column. `changes` are pairs of values before
    and after."""
    chat = chat or {}
    text = Text(no_wrap=False, overflow="fold")  # the console does not fold long words itself
    messages = row.get("messages") or chat.get("messages") or ()
    said = [(message["role"], message["content"]) for message in messages]
    completion = row.get("text", chat.get("completion"))
    for role, content in [*said, *([("completion", completion)] if completion is not None else [])]:
        text.append(f"[{visible(role)}] ", style="cyan").append(f"{_cut(content)}\n")
    for name, value in row.items():
        if name not in ("messages", "text", "changes"):
            text.append(f"{visible(name)}: ", style="bold").append(f"{one_line(value)}\n")
    for name, (before, after) in row.get("changes", {}).items():
        text.append(f"{visible(name)}\n", style="bold")
        text.append(f"- {one_line(before)}\n", style="red").append(f"+ {one_line(after)}\n", style="green")
    text.rstrip()
    return Panel(text, expand=False, title=title, title_align="left")


def _cut(text: str) -> str:
    shown = visible(text[:_MAX_TEXT])
    return shown if len(text) <= _MAX_TEXT else f"{shown} ... ({len(text):,} characters)"
