"""`qrpo inspect`: which of its answers the options ask for."""

from dataclasses import replace
from typing import Any

from flows.views.inspect import terminal
from flows.views.inspect.diff import diff_stage
from flows.views.inspect.export import export_rows, push_to_hub
from flows.views.inspect.lookup import PromptLookup
from flows.views.inspect.prompt import follow_prompt
from flows.views.inspect.rows import ArtifactRows, Query
from flows.views.inspect.stage import inspect_stage
from flows.views.runs import find_manifest, run_name
from qrpo.errors import ConfigError, DataError
from storage import Store

_LIMIT = 5


def answer(
    store: Store, name: str, stage: str, query: Query, *, exact: bool = False, **modes: Any
) -> tuple[dict[str, Any], Any]:
    """The answer as JSON values, and for a terminal. Raises ConfigError for options that exclude
    each other.

    `modes` are the options that ask for something else than rows, of which at most one is not None:
    `prompt_id`, `diff`, `export`, `hub`.
    """
    given = {mode: value for mode, value in modes.items() if value is not None}
    options = [f"--{mode.replace('_', '-')}" for mode in given]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(options)} ask for different things; give one of them")
    mode = next(iter(given), "")
    value: Any = given.get(mode)
    narrowed = [
        f"--{key}" for key in ("where", "sort", "sample", "columns") if getattr(query, key) is not None
    ]
    if narrowed and mode in ("prompt_id", "diff"):
        raise ConfigError(f"{narrowed[0]} has no meaning with {options[0]}")
    run = run_name(name)
    if mode in ("export", "hub"):
        return _export(store, run, stage, query, mode, value)
    query = replace(query, limit=query.limit or _LIMIT)
    if mode == "diff":
        names = [run_name(value), run]
        before, after = (find_manifest(store, one, stage) for one in names)
        shown = {"runs": names, **diff_stage(store, before, after, limit=query.limit or _LIMIT)}
        return shown, terminal.diff(shown)
    data = PromptLookup(store, run)
    if mode == "prompt_id":
        shown = follow_prompt(data, value)
        return shown, terminal.prompt(shown)
    shown = inspect_stage(data, stage, query, exact=exact)
    return shown, terminal.inspection(shown)


def _export(
    store: Store, run: str, stage: str, query: Query, mode: str, target: Any
) -> tuple[dict[str, Any], str]:
    manifest = find_manifest(store, run, stage)
    rows = ArtifactRows(store, manifest.parts)
    if not rows.parts:
        raise DataError(
            f"{stage} of run {run!r} has no table to export; `qrpo show {run} {stage}` lists its files"
        )
    if mode == "hub":
        url = push_to_hub(rows, manifest, run, target, query)
        return {"dataset": url}, f"pushed to {url}"
    written = export_rows(rows, query, target)
    return {"rows": written, "file": str(target)}, f"{written:,} rows written to {target}"
