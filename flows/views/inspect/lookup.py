"""Rows of given prompts in any stage without reading the whole stage: parts record which parts they
were made from.

A prompt is in one part of `prompts`. Its completions, rewards, quantiles and shards are in parts
made from that part. If the records do not say so, every part is read.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any

import polars as pl

from flows.views.inspect.rows import ArtifactRows
from flows.views.runs import RunArtifacts
from qrpo.errors import DataError
from storage import Manifest, PartRecord

_COMPLETION = ("prompt_id", "origin", "sample_index")


class PromptLookup(RunArtifacts):
    """A run's rows by prompt. `sources` are fingerprints of parts of `prompts`; an empty set means
    any part."""

    def find_prompt(self, beginning: str) -> tuple[str, frozenset[str]]:
        """The id of the one prompt whose id begins like this, and its source. DataError if there is
        not exactly one."""
        found = {
            prompt_id: part.fingerprint
            for part in (self.manifests["prompts"].parts if "prompts" in self.manifests else ())
            for _, frame in ArtifactRows(self.store, [part]).scan(["prompt_id"])
            for prompt_id in frame["prompt_id"].filter(frame["prompt_id"].str.starts_with(beginning))
        }
        if not found:
            raise DataError(
                f"no prompt of run {self.run!r} has an id that begins with {beginning!r}; "
                f"`qrpo inspect {self.run} prompts` shows ids"
            )
        if len(found) > 1:
            raise DataError(
                f"{len(found)} prompts have ids that begin with {beginning!r}: {', '.join(sorted(found)[:5])} ...; "
                "give more of it"
            )
        ((prompt_id, source),) = found.items()
        return prompt_id, frozenset([source])

    def find(
        self,
        stage: str,
        prompt_ids: Collection[str],
        sources: frozenset[str],
        columns: Iterable[str] | None = None,
    ) -> list[tuple[PartRecord, int, dict[str, Any]]]:
        """(part, number in the part, row) of the stage's rows of these prompts. Empty if the stage
        has no such rows."""
        manifest = self.manifests.get(stage)
        rows = ArtifactRows(self.store, self._parts_from(manifest, sources) if manifest else ())
        if not rows.parts or "prompt_id" not in rows.schema:
            return []
        wanted = pl.Series(list(prompt_ids), dtype=pl.String).implode()
        positions: list[int] = []
        for start, frame in rows.scan(["prompt_id"]):
            positions += (frame["prompt_id"].is_in(wanted).arg_true() + start).to_list()
        taken = rows.take(positions, None if columns is None else rows.check_columns(list(columns)))
        places = [rows.location(position) for position in positions]
        return [
            (rows.parts[part], number, row)
            for (part, number), row in zip(places, taken.to_dicts(), strict=True)
        ]

    def rejects(self, prompt_id: str, sources: frozenset[str]) -> list[dict[str, Any]]:
        """The rejects of every stage for this prompt."""
        return [
            row
            for manifest in self.manifests.values()
            for part in self._parts_from(manifest, sources)
            if part.rejects
            for row in self.store.read_rejects(part).to_pylist()
            if row["prompt_id"] == prompt_id
        ]

    def conversations(self, rows: ArtifactRows, positions: Sequence[int]) -> list[dict[str, Any]]:
        """For each row, the `messages` of its prompt and the `completion` that it is about, as far
        as there are any."""
        if "prompt_id" not in rows.schema or not positions:
            return [{} for _ in positions]
        keys = [name for name in _COMPLETION if name in rows.schema and not rows.schema[name].is_nested()]
        own = rows.take(positions, [*keys, *({"messages", "text"} & set(rows.schema))]).to_dicts()
        parts = (rows.parts[rows.location(position)[0]] for position in positions)
        above = [self._sources.get(part.fingerprint, frozenset()) for part in parts]
        sources: frozenset[str] = frozenset().union(*above) if all(above) else frozenset()
        ids = {row["prompt_id"] for row in own}
        messages: dict[str, Any] = {}
        if "messages" not in rows.schema:
            found = self.find("prompts", ids, sources, ["prompt_id", "messages"])
            messages = {row["prompt_id"]: row["messages"] for _, _, row in found}
        texts: dict[Any, str] = {}
        if "text" not in rows.schema and keys == list(_COMPLETION):
            found = self.find("completions", ids, sources, [*_COMPLETION, "text"])
            texts = {tuple(row[name] for name in _COMPLETION): row["text"] for _, _, row in found}
        return [
            {
                "messages": row.get("messages") or messages.get(row["prompt_id"]),
                "completion": row.get("text", texts.get(tuple(row.get(name) for name in _COMPLETION))),
            }
            for row in own
        ]

    def _parts_from(self, manifest: Manifest, sources: frozenset[str]) -> Sequence[PartRecord]:
        """The parts made from these sources; all parts if that is not known of every part."""
        above = [self._sources.get(part.fingerprint, frozenset()) for part in manifest.parts]
        if not sources or not all(above):
            return manifest.parts
        return [part for part, own in zip(manifest.parts, above, strict=True) if own & sources]

    @cached_property
    def _sources(self) -> dict[str, frozenset[str]]:
        """Part -> the parts of `prompts` that it was made from row by row. A model comes from all
        of them: not counted."""
        found: dict[str, frozenset[str]] = {}
        for manifest in self.manifests.values():  # in the order of the pipeline: parents come first
            for part in manifest.parts:
                if part.table is not None:
                    own = {part.fingerprint} if part.stage == "prompts" else ()
                    found[part.fingerprint] = frozenset(own).union(
                        *(found.get(one, ()) for one in part.parents)
                    )
        return found
