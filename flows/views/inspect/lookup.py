"""Rows of given prompts in any stage, without reading the stage: parts know which parts they were made from.

A prompt lies in one part of `prompts`; its completions, rewards, quantiles and shards lie in the parts that were made from that part.
Where no part says so, all are read.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import polars as pl

from flows.views.inspect.rows import Rows
from flows.views.show import stages_of
from qrpo.errors import ConfigError, DataError
from storage import Manifest, PartRecord, Store

__all__ = ["RunData"]


class RunData:
    """The artifacts of one run, and the rows in them. `known` are manifests that need not be read again."""

    def __init__(self, store: Store, run: str, known: Iterable[Manifest] = ()) -> None:
        noted = store.run(run)
        if noted is None:
            runs = ", ".join(sorted(store.runs())) or "none yet"
            raise ConfigError(f"no run named {run!r} in {store.url}; its runs: {runs}")
        self.store, self.run, self.noted = store, run, noted
        self._read: dict[tuple[str, str], Manifest | None] = {
            (one.stage, one.fingerprint): one for one in known
        }

    def manifest(self, stage: str, fingerprint: str) -> Manifest | None:
        """An artifact's manifest, read once."""
        if (stage, fingerprint) not in self._read:
            self._read[stage, fingerprint] = self.store.manifest(stage, fingerprint)
        return self._read[stage, fingerprint]

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """Stage -> manifest, in the order of stages; a stage whose artifact was collected is left out."""
        found = {
            stage: self.manifest(stage, entry["fingerprint"])
            for stage, entry in stages_of(self.noted).items()
        }
        return {stage: manifest for stage, manifest in found.items() if manifest is not None}

    def prompt_id(self, beginning: str) -> str:
        """The whole id of the one prompt whose id begins like this; DataError where there is none or more than one."""
        found: dict[str, str] = {}
        for part, ids in self._prompt_ids():
            found |= dict.fromkeys(ids.filter(ids.str.starts_with(beginning)), part)
        if not found:
            raise DataError(
                f"no prompt of run {self.run!r} has an id that begins with {beginning!r}; `qrpo inspect {self.run} prompts` shows ids"
            )
        if len(found) > 1:
            raise DataError(
                f"{len(found)} prompts have ids that begin with {beginning!r}: {', '.join(sorted(found)[:5])} ...; give more of it"
            )
        self._homes |= found
        return next(iter(found))

    def find(
        self, stage: str, prompt_ids: Collection[str], columns: Iterable[str] | None = None
    ) -> list[tuple[PartRecord, int, dict[str, Any]]]:
        """The stage's rows of these prompts, each with its part and number in it; none where the stage has no such rows."""
        manifest = self.manifests.get(stage)
        rows = Rows(self.store, self._parts_about(manifest, prompt_ids)) if manifest else None
        if rows is None or not rows.records or "prompt_id" not in rows.schema:
            return []
        wanted = pl.Series(list(prompt_ids), dtype=pl.String).implode()
        positions: list[int] = []
        for chunk in rows.scan(["prompt_id"]):
            positions += (chunk.frame["prompt_id"].is_in(wanted).arg_true() + chunk.start).to_list()
        taken = rows.take(positions, None if columns is None else rows.check_columns(list(columns)))
        return [
            (*rows.place(position), row) for position, row in zip(positions, taken.to_dicts(), strict=True)
        ]

    def rows(
        self, stage: str, prompt_ids: Collection[str], columns: Iterable[str] | None = None
    ) -> list[dict[str, Any]]:
        """The same, the rows alone."""
        return [row for _, _, row in self.find(stage, prompt_ids, columns)]

    def rejects(self, prompt_id: str) -> list[dict[str, Any]]:
        """Everything that any stage left out of this prompt, with reasons."""
        return [
            row
            for manifest in self.manifests.values()
            for record in self._parts_about(manifest, [prompt_id])
            if record.rejects
            for row in self.store.read_rejects(record).to_pylist()
            if row["prompt_id"] == prompt_id
        ]

    def note_home(self, prompt_id: str, part: PartRecord) -> None:
        """Remember that this part has the prompt, so that it need not be searched for among all prompts."""
        homes = self._made_from(part.fingerprint)
        if len(homes) == 1:
            self._homes[prompt_id] = next(iter(homes))

    @cached_property
    def _homes(self) -> dict[str, str]:
        """Prompt id -> fingerprint of its part of `prompts`, as far as it is known by now."""
        return {}

    def _made_from(self, part: str) -> frozenset[str]:
        """The parts of `prompts` that a part goes back to row by row (a model goes back to all of them, and does not count)."""
        if part not in self._homes_of_parts:
            record = self._tables.get(part)
            above = [self._made_from(parent) for parent in record.parents] if record else []
            own = {part} if record and record.stage == "prompts" else ()
            self._homes_of_parts[part] = frozenset(own).union(*above)
        return self._homes_of_parts[part]

    @cached_property
    def _homes_of_parts(self) -> dict[str, frozenset[str]]:
        return {}

    @cached_property
    def _tables(self) -> dict[str, PartRecord]:
        """Every part of the run that holds rows, by fingerprint."""
        return {
            part.fingerprint: part
            for manifest in self.manifests.values()
            if manifest.parts and manifest.parts[0].table is not None
            for part in manifest.parts
        }

    def _parts_about(self, manifest: Manifest, prompt_ids: Collection[str]) -> Sequence[PartRecord]:
        lacking = {prompt_id for prompt_id in prompt_ids if prompt_id not in self._homes}
        for part, ids in self._prompt_ids() if lacking else ():
            found = lacking.intersection(ids)
            self._homes |= dict.fromkeys(found, part)
            lacking -= found
            if not lacking:
                break
        homes = {self._homes[prompt_id] for prompt_id in prompt_ids if prompt_id in self._homes}
        made_from = [self._made_from(part.fingerprint) for part in manifest.parts]
        if lacking or not all(made_from):
            return manifest.parts
        return [part for part, above in zip(manifest.parts, made_from, strict=True) if homes & above]

    def _prompt_ids(self) -> Iterator[tuple[str, pl.Series]]:
        """(fingerprint, prompt ids) of every part of `prompts`."""
        rows = Rows(self.store, self.manifests["prompts"].parts if "prompts" in self.manifests else ())
        for part, record in enumerate(rows.records):
            if record.rows:
                yield record.fingerprint, rows.read(rows.groups(part), ["prompt_id"])["prompt_id"]
