"""What each address shows: a template's name and its values. Reads the store afresh for every page, and writes nothing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from starlette.datastructures import QueryParams

from flows.views.browse import drawings
from flows.views.browse.tokens import coloured_tokens
from flows.views.inspect.diff import diff_stage
from flows.views.inspect.lookup import RunData
from flows.views.inspect.prompt import follow_prompt
from flows.views.inspect.query import Query, condition_of, find_rows
from flows.views.inspect.rows import Rows, rows_of
from flows.views.inspect.stage import conversations, reject_reasons, training_metrics
from flows.views.inspect.summary import column_nulls, numbers_of, summarise
from flows.views.inspect.text import one_line
from flows.views.show import list_runs, part_urls, size_text, stages_of
from qrpo.errors import DataError, QRPOError
from storage import Manifest, Store
from tasks.stages import STAGE_NAMES

__all__ = ["NotFoundError", "Pages", "TidierAddressError", "View"]

_PER_PAGE = 50
_SECONDS, _COUNT_SECONDS = 10.0, 2.0  # looking for rows, counting the others that match
_MOST_COMPARED = 2_000_000  # rows; more are for the command line
_CELL = 240  # characters

View = tuple[str, dict[str, Any]]
"""A template's name and its values."""


class NotFoundError(Exception):
    """There is no such run, stage, artifact, row or prompt."""


class TidierAddressError(Exception):
    """The same page has a shorter address, which is worth sharing: `address`."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


@dataclass(frozen=True)
class Place:
    """An artifact and where it stands in the addresses: under a run, or by its fingerprint alone."""

    run: str | None
    manifest: Manifest
    base: str


class Pages:
    """The pages of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def home(self) -> View:
        """All runs."""
        runs = list_runs(self.store)["runs"]
        newest = sorted(runs, key=lambda name: (runs[name]["updated"] or "", name), reverse=True)
        return "home.html", {"runs": {name: runs[name] for name in newest}, "stages": STAGE_NAMES}

    def artifacts(self) -> View:
        """Every artifact in the store, and the runs that name it."""
        runs: dict[tuple[str, str], list[str]] = {}
        for run in sorted(self.store.runs()):
            for stage, entry in stages_of(self.store.run(run) or {}).items():
                runs.setdefault((stage, entry["fingerprint"]), []).append(run)
        found: list[dict[str, Any]] = []
        for key in self.store.list("artifacts"):
            stage, fingerprint, name = key.split("/")[1:4]
            if name == "manifest.json" and (manifest := self.store.manifest(stage, fingerprint)) is not None:
                found.append({"manifest": manifest, "runs": runs.get((stage, fingerprint), [])})
        order = {stage: place for place, stage in enumerate(STAGE_NAMES)}
        found.sort(key=lambda one: (order.get(one["manifest"].stage, 99), one["manifest"].created))
        return "artifacts.html", {"artifacts": found}

    def run(self, name: str) -> View:
        """A run's artifacts and which was made from which."""
        manifests = self._run(name).manifests
        stages = list(manifests)
        nodes = [
            {
                "name": stage,
                "note": f"{manifest.rows:,} rows, {size_text(manifest.bytes)}",
                "href": f"/runs/{quote(name)}/{quote(stage)}",
            }
            for stage, manifest in manifests.items()
        ]
        edges = [
            (stages.index(parent), number)
            for number, manifest in enumerate(manifests.values())
            for parent in manifest.parents
            if parent in stages and manifests[parent].fingerprint == manifest.parents[parent]
        ]
        others = [other for other in sorted(self.store.runs()) if other != name]
        graph = drawings.lineage(nodes, edges) if nodes else ""
        return "run.html", {"run": name, "manifests": manifests, "graph": graph, "others": others}

    def rows(self, place: Place, asked: QueryParams) -> View:
        """A page of the artifact's rows."""
        rows = rows_of(self.store, place.manifest)
        values = self._artifact(place, "rows", asked)
        if rows is None:
            return self._model(place, values)
        query, number = _query(asked), _number(asked.get("page"), 1)
        chosen = [name for name in asked.getlist("columns") if name in rows.schema]
        usual = [name for name in rows.schema if "token_ids" not in name]
        _tidy(asked, values["link"](columns=None) if chosen == usual else values["link"](), chosen == usual)
        columns = chosen or usual
        values |= {
            "columns": list(rows.schema),
            "chosen": columns,
            "sortable": _sortable(rows),
            "page": number,
        }
        try:
            found = find_rows(
                rows,
                query,
                limit=_PER_PAGE + (query.sample is None),
                offset=0 if query.sample is not None else (number - 1) * _PER_PAGE,
                seconds=_SECONDS,
                count_seconds=_COUNT_SECONDS,
            )
            positions = found.positions[:_PER_PAGE]
            taken = rows.take(positions, columns).to_dicts()
        except QRPOError as error:
            return "rows.html", values | {"error": str(error), "rows": [], "found": None, "more": False}
        table = [
            {"position": position, "cells": [_cell(name, row[name]) for name in columns]}
            for position, row in zip(positions, taken, strict=True)
        ]
        more = len(found.positions) > _PER_PAGE
        pages = None if found.matches is None else max(1, -(-found.matches // _PER_PAGE))
        return "rows.html", values | {
            "error": None,
            "rows": table,
            "found": found,
            "more": more,
            "pages": pages,
        }

    def row(self, place: Place, position: int) -> View:
        """One row in full, with its conversation."""
        rows = rows_of(self.store, place.manifest)
        if rows is None or not 0 <= position < len(rows):
            raise NotFoundError(f"{place.manifest.stage} has no row {position}")
        part, number = rows.place(position)
        taken = rows.take([position]).to_dicts()[0]
        chat: dict[str, Any] = {}
        if place.run is not None:
            chat = conversations(self._run(place.run), rows, [position], [part])[0]
        messages = taken.get("messages") or chat.get("messages") or []
        completion = taken.get("text") if "text" in taken else chat.get("completion")
        fields = {name: _long(value) for name, value in taken.items() if name not in ("messages", "text")}
        last = len(rows) - 1
        values = {
            "position": position,
            "last": last,
            "part": part.fingerprint,
            "number": number,
            "prompt_id": taken.get("prompt_id"),
        }
        return "row.html", self._artifact(place, "rows") | values | {
            "messages": messages,
            "completion": completion,
            "fields": fields,
        }

    def numbers(self, place: Place, asked: QueryParams) -> View:
        """Schema, nulls and distributions."""
        values = self._artifact(place, "numbers", asked)
        rows = rows_of(self.store, place.manifest)
        if rows is None:
            return self._model(place, values)
        values |= {
            "schema": {name: str(kind) for name, kind in rows.schema.items()},
            "nulls": column_nulls(rows),
        }
        _tidy(asked, values["link"]("/numbers"), False)
        try:
            numbers = summarise(rows, condition=condition_of(rows, _query(asked)))
        except QRPOError as error:
            return "numbers.html", values | {"error": str(error), "numbers": {}, "plots": {}}
        plots = {name: drawings.histogram([known]) for name, known in numbers.items()}
        return "numbers.html", values | {"error": None, "numbers": numbers, "plots": plots}

    def rejects(self, place: Place, asked: QueryParams) -> View:
        """What the stage left out, with reasons."""
        number = _number(asked.get("page"), 1)
        first, last = (number - 1) * _PER_PAGE, number * _PER_PAGE
        found: list[dict[str, Any]] = []
        at = 0
        for record in place.manifest.parts:
            if at < last and at + record.rejects > first:
                found += (
                    self.store.read_rejects(record)
                    .slice(max(0, first - at), last - max(first, at))
                    .to_pylist()
                )
            at += record.rejects
        values = {"rejects": found, "reasons": reject_reasons(self.store, place.manifest), "page": number}
        return "rejects.html", self._artifact(place, "rejects", asked) | values | {
            "more": last < place.manifest.rejects
        }

    def origin(self, place: Place) -> View:
        """What made the artifact, and where its files lie."""
        manifest = place.manifest
        settings = {
            **_flat(manifest.config, "config"),
            **_flat(manifest.inputs, "inputs"),
            **_flat(manifest.metadata, "metadata"),
        }
        files = [url for part in manifest.parts[:100] for url in part_urls(self.store, part)]
        return "origin.html", self._artifact(place, "origin") | {"settings": settings, "files": files[:200]}

    def prompt(self, run: str, beginning: str) -> View:
        """One prompt through every stage."""
        followed = self._followed(run, beginning)
        return "prompt.html", {
            "run": run,
            "others": [one for one in sorted(self.store.runs()) if one != run],
            **followed,
        }

    def compare(self, asked: QueryParams) -> View:
        """Two runs: which artifacts differ, and one stage's rows and distributions side by side."""
        runs = sorted(self.store.runs())
        names = [asked.get("a", ""), asked.get("b", "")]
        values: dict[str, Any] = {
            "runs": runs,
            "a": names[0],
            "b": names[1],
            "stages": [],
            "stage": None,
            "diff": None,
            "error": None,
        }
        if not all(names):
            return "compare.html", values
        sides = [self._run(name).manifests for name in names]
        values["stages"] = [
            {"name": stage, "sides": [side.get(stage) for side in sides]}
            for stage in STAGE_NAMES
            if any(stage in side for side in sides)
        ]
        stage = asked.get("stage") or next(
            (s["name"] for s in values["stages"] if s["name"] == "rewards"), "prompts"
        )
        values["stage"] = stage
        pair = [side.get(stage) for side in sides]
        if pair[0] is None or pair[1] is None:
            return "compare.html", values | {"error": f"only one of the runs has {stage}"}
        flat = [_flat({**one.config, "inputs": dict(one.inputs)}) for one in pair if one is not None]
        values["settings"] = {
            key: [side.get(key, "") for side in flat]
            for key in sorted({*flat[0], *flat[1]})
            if flat[0].get(key) != flat[1].get(key)
        }
        try:
            diff = diff_stage(self.store, pair[0], pair[1], limit=_PER_PAGE, most_rows=_MOST_COMPARED)
        except DataError as error:
            return "compare.html", values | {"error": str(error)}
        both = [name for name in diff["numbers"][0] if name in diff["numbers"][1]]
        plots = {name: drawings.histogram([side[name] for side in diff["numbers"]], names) for name in both}
        return "compare.html", values | {
            "diff": diff,
            "plots": plots,
            "changed": [_change(row) for row in diff["examples"]["changed"]],
        }

    def compare_prompt(self, beginning: str, asked: QueryParams) -> View:
        """One prompt in two runs."""
        names = [asked.get("a", ""), asked.get("b", "")]
        sides = [self._followed(name, beginning) for name in names]
        return "compare_prompt.html", {
            "names": names,
            "sides": sides,
            "prompt_id": sides[0]["prompt_id"],
            "a": names[0],
            "b": names[1],
        }

    def place(self, run: str | None, stage: str, fingerprint: str | None) -> Place:
        """The artifact that an address means; NotFoundError where there is none."""
        if run is not None:
            manifest = self._run(run).manifests.get(stage)
            base = f"/runs/{quote(run)}/{quote(stage)}"
        else:
            manifest = self.store.manifest(stage, fingerprint or "")
            base = f"/artifacts/{quote(stage)}/{quote(fingerprint or '')}"
        if manifest is None:
            raise NotFoundError(f"there is no {stage} {fingerprint or f'of run {run}'} in this store")
        return Place(run, manifest, base)

    def _run(self, name: str) -> RunData:
        try:
            return RunData(self.store, name)
        except QRPOError as error:
            raise NotFoundError(str(error)) from None

    def _followed(self, run: str, beginning: str) -> dict[str, Any]:
        data = self._run(run)
        try:
            followed = follow_prompt(data, beginning)
        except DataError as error:
            raise NotFoundError(str(error)) from None
        for row in (*followed["completions"], *followed["samples"]):
            row["tokens"] = coloured_tokens(self.store, data.manifests.get("policy"), row)
            row["plot"] = None
            if row["reward"] is not None and followed["ref_rewards"]:
                mark = (row["reward"], f"{row['origin']} {row['sample_index']}")
                row["plot"] = drawings.cdf(followed["ref_rewards"], [mark])
        others = {
            stage: [{name: _long(value) for name, value in row.items()} for row in rows]
            for stage, rows in followed["stages"].items()
        }
        return followed | {
            "others_of": {stage: others[stage] for stage in ("quantiles", "shards") if others.get(stage)}
        }

    def _artifact(self, place: Place, tab: str, asked: QueryParams | None = None) -> dict[str, Any]:
        """What every page of an artifact needs; `link` makes an address that keeps what was asked but for some changes."""
        asked = asked if asked is not None else QueryParams()
        kept = [
            (key, value)
            for key, value in asked.multi_items()
            if value and key in ("where", "q", "sort", "columns", "sample", "page")
        ]

        def link(path: str = "", **changes: Any) -> str:
            pairs = [(key, value) for key, value in kept if key not in changes]
            pairs += [(key, str(value)) for key, value in changes.items() if value is not None]
            return place.base + path + (f"?{urlencode(pairs)}" if pairs else "")

        return {
            "place": place,
            "run": place.run,
            "manifest": place.manifest,
            "tab": tab,
            "link": link,
            "asked": dict(kept),
        }

    def _model(self, place: Place, values: dict[str, Any]) -> View:
        """A folder artifact: what training logged, and its files."""
        metrics = training_metrics(self.store, place.manifest)
        plots: dict[str, Any] = {}
        numbers: dict[str, Any] = {}
        if metrics is not None:
            numbers = {
                name: known for name in metrics.columns if (known := numbers_of(metrics[name])) is not None
            }
            plots = {name: drawings.histogram([known]) for name, known in numbers.items()}
        steps = (
            []
            if metrics is None
            else [[one_line(value) for value in row] for row in metrics.head(500).iter_rows()]
        )
        columns = [] if metrics is None else metrics.columns
        return "model.html", values | {"columns": columns, "steps": steps, "plots": plots, "numbers": numbers}


def _tidy(asked: QueryParams, address: str, usual: bool) -> None:
    """Raise TidierAddressError where a form sent fields that say nothing."""
    if usual or not all(value for _, value in asked.multi_items()):
        raise TidierAddressError(address)


def _query(asked: QueryParams) -> Query:
    sample = asked.get("sample")
    return Query(
        where=asked.get("where") or None,
        search=asked.get("q") or None,
        sort=asked.get("sort") or None,
        sample=_number(sample, 0) if sample else None,
    )


def _number(text: str | None, otherwise: int) -> int:
    return (
        min(int(text), 10**6)
        if text and text.isascii() and text.isdigit() and len(text) < 10 and int(text)
        else otherwise
    )


def _sortable(rows: Rows) -> list[str]:
    return [name for name, kind in rows.schema.items() if not kind.is_nested()]


def _cell(name: str, value: Any) -> dict[str, Any]:
    if name == "messages" and value:
        value = value[-1]["content"]
    return {
        "name": name,
        "value": value,
        "text": "" if value is None else one_line(value, _CELL),
        "number": isinstance(value, int | float),
    }


def _long(value: Any) -> str:
    return "" if value is None else one_line(value, 20_000)


def _change(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "changes": {name: [one_line(value, 2000) for value in pair] for name, pair in row["changes"].items()},
    }


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Nested settings as dotted key -> JSON text."""
    if isinstance(value, Mapping) and value:
        return {
            key: text
            for name, item in value.items()
            for key, text in _flat(item, f"{path}.{name}" if path else str(name)).items()
        }
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and any(isinstance(item, Mapping) for item in value)
    ):
        return {
            key: text
            for place, item in enumerate(value)
            for key, text in _flat(item, f"{path}.{place}").items()
        }
    return {path: json.dumps(value, ensure_ascii=False, default=str)} if path else {}
