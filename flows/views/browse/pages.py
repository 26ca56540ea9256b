"""What each address shows: a template's name and its values. Reads the store afresh for every page
and writes nothing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlencode

from starlette.datastructures import QueryParams
from starlette.requests import Request

from flows.views.browse import drawings
from flows.views.browse.tokens import coloured_tokens
from flows.views.inspect.diff import diff_stage
from flows.views.inspect.lookup import PromptLookup
from flows.views.inspect.prompt import follow_prompt
from flows.views.inspect.rows import ArtifactRows, Query, condition_of, find_rows
from flows.views.inspect.stage import metrics_of
from flows.views.inspect.summary import column_nulls, summarise
from flows.views.runs import RunArtifacts, flatten, part_urls
from flows.views.show import list_runs
from flows.views.text import one_line
from qrpo.errors import DataError, QRPOError
from storage import Artifact, Manifest, Store
from tasks.artifact_summary import compare_models, reject_reasons, training_metrics
from tasks.stages import STAGE_NAMES

_PER_PAGE = 50
_SECONDS, _COUNT_SECONDS = 10.0, 2.0  # to find rows, to count the other matches
_MAX_COMPARED = 2_000_000  # rows; the command line compares more
_CELL = 240  # characters
_STEPS = 500  # of a training run
_SETTINGS = (
    "reference.model.path",
    "completions.num_ref",
    "policy.loss",
    "policy.beta",
    "policy.transform",
    "policy.learning_rate",
    "policy.num_train_epochs",
)
_PARAMETERS = ("where", "q", "sort", "columns", "sample", "page")

View = tuple[str, dict[str, Any]]
"""A template's name and its values."""


class NotFoundError(Exception):
    """There is no such run, stage, artifact, row or prompt."""


@dataclass(frozen=True)
class ArtifactPage:
    """A page about an artifact: the artifact's address (by run, or by fingerprint) and the tab;
    `asked` are parameters."""

    run: str | None
    manifest: Manifest
    rows: ArtifactRows
    base: str
    tab: str
    asked: Sequence[tuple[str, str]]

    def link(self, tab: str | None = None, **changes: Any) -> str:
        """An address of the artifact with the same parameters but for the changes; None removes
        one."""
        pairs = [(key, value) for key, value in self.asked if key not in changes]
        pairs += [(key, str(value)) for key, value in changes.items() if value is not None]
        return self.address(tab or self.tab) + (f"?{urlencode(pairs)}" if pairs else "")

    def address(self, tab: str) -> str:
        """The address of a tab without parameters."""
        return self.base if tab == "rows" else f"{self.base}/{tab}"

    def values(self, **more: Any) -> dict[str, Any]:
        """What every template of an artifact needs, and more."""
        shared = {name: getattr(self, name) for name in ("run", "manifest", "base", "tab", "link")}
        return shared | {"asked": dict(self.asked), "address": self.address(self.tab)} | more


class Pages:
    """The pages of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def home(self, request: Request) -> View:
        """All runs."""
        runs = list_runs(self.store)["runs"]
        newest = sorted(runs, key=lambda name: (runs[name]["updated"] or "", name), reverse=True)
        return "home.html", {"runs": {name: runs[name] for name in newest}}

    def artifacts(self, request: Request) -> View:
        """Every artifact in the store, and the runs that name it."""
        runs: dict[tuple[str, str], list[str]] = {}
        for run in sorted(self.store.runs()):
            for stage, entry in RunArtifacts(self.store, run).stages.items():
                runs.setdefault((stage, entry["fingerprint"]), []).append(run)
        found: list[dict[str, Any]] = []
        for key in self.store.list("artifacts"):
            stage, fingerprint, name = key.split("/")[1:4]
            if name == "manifest.json" and (manifest := self.store.manifest(stage, fingerprint)) is not None:
                found.append({"manifest": manifest, "runs": runs.get((stage, fingerprint), [])})
        order = {stage: place for place, stage in enumerate(STAGE_NAMES)}
        found.sort(key=lambda one: (order.get(one["manifest"].stage, 99), one["manifest"].created))
        return "artifacts.html", {"artifacts": found}

    def run(self, request: Request) -> View:
        """A run's result, and its artifacts."""
        name = request.path_params["run"]
        run = self._run(name)
        manifests = run.manifests
        summary = manifests["evaluation"].metadata.get("summary") if "evaluation" in manifests else None
        config = flatten(run.noted.get("config", {}))
        metrics = training_metrics(self.store, manifests["policy"]) if "policy" in manifests else None
        losses: list[Any] = []
        if metrics is not None and "loss" in metrics.columns:
            losses = metrics.select("step", "loss").drop_nulls().rows()
        return "run.html", {
            "run": name,
            "manifests": manifests,
            "comparison": compare_models(summary) if summary else None,
            "settings": {key: config[key] for key in _SETTINGS if key in config},
            "loss": drawings.curve(losses, "loss") if losses else None,
            "others": self._others(name),
        }

    def rows(self, request: Request) -> View:
        """A page of the artifact's rows."""
        page = self._artifact(request, "rows")
        rows = page.rows
        if not rows.parts:
            return self._model(page)
        asked, number = request.query_params, _number(request.query_params.get("page"), 1)
        sampled = bool(asked.get("sample"))
        columns = [value for key, value in page.asked if key == "columns"] or _usual(rows)
        query = replace(_query(asked), limit=_PER_PAGE if sampled else _PER_PAGE + 1)
        values = page.values(
            columns=list(rows.schema),
            chosen=columns,
            sortable=[name for name, kind in rows.schema.items() if not kind.is_nested()],
            page=number,
        )
        offset = 0 if sampled else (number - 1) * _PER_PAGE
        try:
            found = find_rows(rows, query, offset=offset, seconds=_SECONDS, count_seconds=_COUNT_SECONDS)
            positions = found.positions[:_PER_PAGE]
            taken = rows.take(positions, columns).to_dicts()
        except QRPOError as error:
            return "rows.html", values | {"error": str(error), "rows": [], "found": None, "more": False}
        table = [
            {"position": position, "cells": [_cell(name, row[name]) for name in columns]}
            for position, row in zip(positions, taken, strict=True)
        ]
        pages = None if found.matches is None else max(1, -(-found.matches // _PER_PAGE))
        more = len(found.positions) > _PER_PAGE
        return "rows.html", values | {
            "error": None,
            "rows": table,
            "found": found,
            "more": more,
            "pages": pages,
        }

    def row(self, request: Request) -> View:
        """One row in full, with its conversation."""
        page, position = self._artifact(request, "rows"), request.path_params["position"]
        rows = page.rows
        if not 0 <= position < len(rows):
            raise NotFoundError(f"{page.manifest.stage} has no row {position}")
        part, number = rows.location(position)
        (row,) = rows.take([position]).to_dicts()
        chat = self._run(page.run).conversations(rows, [position])[0] if page.run is not None else {}
        return "row.html", page.values(
            position=position,
            last=len(rows) - 1,
            part=rows.parts[part].fingerprint,
            number=number,
            prompt_id=row.get("prompt_id"),
            messages=row.get("messages") or chat.get("messages") or [],
            completion=row.get("text", chat.get("completion")),
            fields={name: _long(value) for name, value in row.items() if name not in ("messages", "text")},
        )

    def numbers(self, request: Request) -> View:
        """Schema, nulls and distributions."""
        page = self._artifact(request, "numbers")
        rows = page.rows
        if not rows.parts:
            return self._model(page)
        numbers, failed = {}, None
        try:
            numbers = summarise(rows, condition=condition_of(rows, _query(request.query_params)))
        except QRPOError as error:
            failed = str(error)
        schema = {name: str(kind) for name, kind in rows.schema.items()}
        return "numbers.html", page.values(
            schema=schema, nulls=column_nulls(rows), numbers=numbers, plots=_plots(numbers), error=failed
        )

    def rejects(self, request: Request) -> View:
        """Rejected rows with their reasons."""
        page, number = self._artifact(request, "rejects"), _number(request.query_params.get("page"), 1)
        first = (number - 1) * _PER_PAGE
        return "rejects.html", page.values(
            rejects=Artifact(self.store, page.manifest).rejects.slice(first, _PER_PAGE).to_pylist(),
            reasons=reject_reasons(self.store, page.manifest),
            page=number,
            more=first + _PER_PAGE < page.manifest.rejects,
        )

    def origin(self, request: Request) -> View:
        """What made the artifact, and where its files are."""
        page = self._artifact(request, "origin")
        settings = {
            key: text
            for section in ("config", "inputs", "metadata")
            for key, text in flatten(getattr(page.manifest, section), section).items()
        }
        files = [url for part in page.manifest.parts[:100] for url in part_urls(self.store, part)]
        return "origin.html", page.values(settings=settings, files=files[:200])

    def prompt(self, request: Request) -> View:
        """One prompt through every stage."""
        run = request.path_params["run"]
        return "prompt.html", {"others": self._others(run), **self._followed(run, request)}

    def compare(self, request: Request) -> View:
        """Two runs: which artifacts differ, and one stage's rows and distributions side by side."""
        a, b = names = [request.query_params.get(key, "") for key in ("a", "b")]
        values: dict[str, Any] = {"runs": sorted(self.store.runs()), "a": a, "b": b}
        values |= {"stages": [], "stage": None, "diff": None, "error": None}
        if not all(names):
            return "compare.html", values
        sides = [self._run(name).manifests for name in names]
        stages = {stage: [side.get(stage) for side in sides] for stage in STAGE_NAMES}
        stages = {stage: pair for stage, pair in stages.items() if any(pair)}
        stage = request.query_params.get("stage") or ("rewards" if "rewards" in stages else "prompts")
        values |= {"stages": stages, "stage": stage}
        before, after = stages.get(stage, [None, None])
        if before is None or after is None:
            return "compare.html", values | {"error": f"only one of the runs has {stage}"}
        flat = [flatten({**one.config, "inputs": dict(one.inputs)}) for one in (before, after)]
        values["settings"] = {
            key: [side.get(key, "") for side in flat]
            for key in sorted({*flat[0], *flat[1]})
            if flat[0].get(key) != flat[1].get(key)
        }
        try:
            diff = diff_stage(self.store, before, after, limit=_PER_PAGE, max_rows=_MAX_COMPARED)
        except DataError as error:
            return "compare.html", values | {"error": str(error)}
        old, new = diff["numbers"]
        plots = {name: drawings.histogram([old[name], new[name]], names) for name in old if name in new}
        for row in diff["examples"]["changed"]:
            row["changes"] = {
                name: [one_line(value, 2000) for value in pair] for name, pair in row["changes"].items()
            }
        return "compare.html", values | {"diff": diff, "plots": plots}

    def compare_prompt(self, request: Request) -> View:
        """One prompt in two runs."""
        a, b = names = [request.query_params.get(key, "") for key in ("a", "b")]
        sides = [self._followed(name, request) for name in names]
        values = {"names": names, "sides": sides, "prompt_id": sides[0]["prompt_id"], "a": a, "b": b}
        return "compare_prompt.html", values

    def _artifact(self, request: Request, tab: str) -> ArtifactPage:
        """The artifact that an address means, with the parameters that have a meaning for it."""
        named = request.path_params
        run, stage, fingerprint = named.get("run"), named["stage"], named.get("fingerprint", "")
        if run is not None:
            manifest, base = self._run(run).manifests.get(stage), f"/runs/{quote(run)}/{quote(stage)}"
        else:
            manifest = self.store.manifest(stage, fingerprint)
            base = f"/artifacts/{quote(stage)}/{quote(fingerprint)}"
        if manifest is None:
            raise NotFoundError(f"there is no {stage} {fingerprint or f'of run {run}'} in this store")
        rows = ArtifactRows(self.store, manifest.parts)
        pairs = [
            (key, value) for key, value in request.query_params.multi_items() if value and key in _PARAMETERS
        ]
        columns = [value for key, value in pairs if key == "columns" and rows.parts and value in rows.schema]
        if not rows.parts or columns == _usual(rows):
            columns = []
        asked = [pair for pair in pairs if pair[0] != "columns"] + [("columns", name) for name in columns]
        return ArtifactPage(run, manifest, rows, base, tab, asked)

    def _run(self, name: str) -> PromptLookup:
        with _or_not_found():
            return PromptLookup(self.store, name)

    def _others(self, run: str) -> list[str]:
        return [name for name in sorted(self.store.runs()) if name != run]

    def _followed(self, run: str, request: Request) -> dict[str, Any]:
        data = self._run(run)
        with _or_not_found():
            followed = follow_prompt(data, request.path_params["prompt_id"])
        for row in (*followed["completions"], *followed["samples"]):
            row["tokens"] = coloured_tokens(self.store, data.manifests.get("policy"), row)
            row["plot"] = None
            if row["reward"] is not None and followed["ref_rewards"]:
                mark = (row["reward"], f"{row['origin']} {row['sample_index']}")
                row["plot"] = drawings.cdf(followed["ref_rewards"], [mark])
        stored = {
            stage: [{name: _long(value) for name, value in row.items()} for row in followed["stages"][stage]]
            for stage in ("quantiles", "shards")
            if followed["stages"].get(stage)
        }
        return followed | {"stored": stored}

    def _model(self, page: ArtifactPage) -> View:
        """A folder artifact: what training logged, and its files."""
        shown = metrics_of(self.store, page.manifest, Query(limit=_STEPS))
        steps = [[one_line(value) for value in step.values()] for step in shown["samples"]]
        numbers = shown["numbers"]
        columns = list(shown["columns"])
        return "model.html", page.values(columns=columns, steps=steps, plots=_plots(numbers), numbers=numbers)


@contextmanager
def _or_not_found() -> Iterator[None]:
    try:
        yield
    except QRPOError as error:
        raise NotFoundError(str(error)) from None


def _plots(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: drawings.histogram([known]) for name, known in numbers.items()}


def _usual(rows: ArtifactRows) -> list[str]:
    """The columns that are shown unless others are chosen: long lists of numbers are not."""
    return [name for name in rows.schema if "token_ids" not in name]


def _query(asked: QueryParams) -> Query:
    where, search, sort, sample = (asked.get(key) or None for key in ("where", "q", "sort", "sample"))
    return Query(where, search, sort, _number(sample, 0) if sample else None)


def _number(text: str | None, default: int) -> int:
    """A positive number from an address; the default for anything else."""
    valid = text and text.isascii() and text.isdigit() and len(text) < 10 and int(text)
    return min(int(text), 10**6) if text and valid else default


def _cell(name: str, value: Any) -> dict[str, Any]:
    if name == "messages" and value:
        value = value[-1]["content"]
    text = "" if value is None else one_line(value, _CELL)
    return {"name": name, "value": value, "text": text, "number": isinstance(value, int | float)}


def _long(value: Any) -> str:
    return "" if value is None else one_line(value, 20_000)
