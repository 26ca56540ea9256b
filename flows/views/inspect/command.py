"""`qrpo inspect`: what was asked, and which of the answers it is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.views.inspect.query import Query
from flows.views.show import find_manifest, run_name
from qrpo.errors import ConfigError, DataError
from storage import Store

__all__ = ["Asked", "answer"]


@dataclass(frozen=True)
class Asked:
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


def answer(url: str, asked: Asked) -> tuple[dict[str, Any], Callable[[Console], None]]:
    """The answer as JSON values, and how to print it. Raises ConfigError for options that do not go together."""
    chosen = [
        f"--{name.replace('_', '-')}"
        for name in ("prompt_id", "diff", "export", "hub")
        if getattr(asked, name) is not None
    ]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} ask for different things; give one of them")
    narrowed = [
        f"--{name}" for name in ("where", "sort", "sample", "columns") if getattr(asked, name) is not None
    ]
    if narrowed and chosen and chosen[0] in ("--prompt-id", "--diff"):
        raise ConfigError(f"{narrowed[0]} has no meaning with {chosen[0]}")
    store, run = Store(url), run_name(asked.name)
    if asked.prompt_id is not None:
        return _prompt(store, run, asked.prompt_id)
    if asked.diff is not None:
        return _diff(store, run, asked)
    if asked.export is not None or asked.hub is not None:
        return _export(store, run, asked)
    from flows.views.inspect.stage import inspect_stage
    from flows.views.inspect.terminal import print_inspection

    manifest = find_manifest(store, run, asked.stage)
    query = Query(where=asked.where, sort=asked.sort, sample=asked.sample)
    shown = inspect_stage(
        store, run, manifest, query, columns=asked.columns, limit=asked.limit or 5, exact=asked.exact
    )
    return shown, partial(print_inspection, shown)


def _prompt(store: Store, run: str, prompt_id: str) -> tuple[dict[str, Any], Callable[[Console], None]]:
    from flows.views.inspect.lookup import RunData
    from flows.views.inspect.prompt import follow_prompt
    from flows.views.inspect.terminal import print_prompt

    followed = follow_prompt(RunData(store, run), prompt_id)
    return followed, partial(print_prompt, followed)


def _diff(store: Store, run: str, asked: Asked) -> tuple[dict[str, Any], Callable[[Console], None]]:
    from flows.views.inspect.diff import diff_stage
    from flows.views.inspect.terminal import print_diff

    other = run_name(asked.diff or "")
    before, after = (find_manifest(store, name, asked.stage) for name in (other, run))
    shown = {"runs": [other, run], **diff_stage(store, before, after, limit=asked.limit or 5)}
    return shown, partial(print_diff, shown, (other, run))


def _export(store: Store, run: str, asked: Asked) -> tuple[dict[str, Any], Callable[[Console], None]]:
    from flows.views.inspect.export import export_rows, push_to_hub
    from flows.views.inspect.rows import rows_of

    manifest = find_manifest(store, run, asked.stage)
    rows = rows_of(store, manifest)
    if rows is None:
        raise DataError(
            f"{asked.stage} of run {run!r} holds no table to export; `qrpo show {run} {asked.stage}` lists its files"
        )
    query = Query(where=asked.where, sort=asked.sort, sample=asked.sample)
    if asked.export is not None:
        written = export_rows(rows, query, asked.export, columns=asked.columns, limit=asked.limit)
        done = {"rows": written, "file": str(asked.export)}
        line = f"{written:,} rows written to {asked.export}"
    else:
        address = push_to_hub(
            rows, manifest, run, asked.hub or "", query, columns=asked.columns, limit=asked.limit
        )
        done = {"dataset": address}
        line = f"pushed to {address}"
    return done, lambda console: console.print(line)
