"""`qrpo inspect`: which of its answers the options ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.views.inspect import terminal
from flows.views.inspect.diff import diff_stage
from flows.views.inspect.export import export_rows, push_to_hub
from flows.views.inspect.lookup import PromptLookup
from flows.views.inspect.rows import ArtifactRows, Query
from flows.views.inspect.stage import inspect_stage
from flows.views.runs import find_manifest, run_name
from qrpo.errors import ConfigError, DataError
from storage import Store

__all__ = ["InspectOptions", "answer"]

Answer = tuple[dict[str, Any], Callable[[Console], None]]


@dataclass(frozen=True)
class InspectOptions:
    """The command's options."""

    name: str
    stage: str
    where: str | None = None
    sort: str | None = None
    sample: int | None = None
    limit: int | None = None
    exact: bool = False
    columns: list[str] | None = None
    prompt_id: str | None = None
    diff: str | None = None
    export: Path | None = None
    hub: str | None = None


def answer(url: str, options: InspectOptions) -> Answer:
    """The answer as JSON values, and a function that prints it. Raises ConfigError for options that exclude each other."""

    def given(*names: str) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]

    modes = given("prompt_id", "diff", "export", "hub")
    if len(modes) > 1:
        raise ConfigError(f"{' and '.join(modes)} ask for different things; give one of them")
    narrowed = given("where", "sort", "sample", "columns")
    if narrowed and modes and modes[0] in ("--prompt-id", "--diff"):
        raise ConfigError(f"{narrowed[0]} has no meaning with {modes[0]}")
    store, run, limit = Store(url), run_name(options.name), options.limit or 5
    query = Query(where=options.where, sort=options.sort, sample=options.sample)
    if options.export is not None or options.hub is not None:
        return _export(store, run, query, options)
    if options.diff is not None:
        names = [run_name(options.diff), run]
        before, after = (find_manifest(store, name, options.stage) for name in names)
        shown = {"runs": names, **diff_stage(store, before, after, limit=limit)}
        return shown, partial(terminal.print_diff, shown)
    data = PromptLookup(store, run)
    if options.prompt_id is not None:
        from flows.views.inspect.prompt import follow_prompt  # imports scipy

        shown = follow_prompt(data, options.prompt_id)
        return shown, partial(terminal.print_prompt, shown)
    columns, exact = options.columns, options.exact
    shown = inspect_stage(data, options.stage, query, columns=columns, limit=limit, exact=exact)
    return shown, partial(terminal.print_inspection, shown)


def _export(store: Store, run: str, query: Query, options: InspectOptions) -> Answer:
    stage, columns, limit = options.stage, options.columns, options.limit
    manifest = find_manifest(store, run, stage)
    rows = ArtifactRows(store, manifest.parts)
    if not rows.parts:
        raise DataError(
            f"{stage} of run {run!r} has no table to export; `qrpo show {run} {stage}` lists its files"
        )
    if options.export is not None:
        written = export_rows(rows, query, options.export, columns=columns, limit=limit)
        done: dict[str, Any] = {"rows": written, "file": str(options.export)}
        line = f"{written:,} rows written to {options.export}"
    else:
        url = push_to_hub(rows, manifest, run, options.hub or "", query, columns=columns, limit=limit)
        done, line = {"dataset": url}, f"pushed to {url}"
    return done, lambda console: console.print(line)
