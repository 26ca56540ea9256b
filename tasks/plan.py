"""What a stage would do: its parts, their fingerprints, and which of them the store has.

- The *family* is the hash of a stage's name, its version, the settings that change its rows and the
  identity of outside inputs (model, reward source).
- A *part's* fingerprint is the hash of its family, of what it reads from its parents and of its
  slice (`part_key`).
- The *artifact's* fingerprint is the hash of its family and of which rows were asked for
  (`StagePlan.rows`), however they are cut into parts. So a part size changes no artifact, and no
  part of a finished one.

All of that is known before anything is computed: the plan of the whole pipeline follows from the
prompts alone.

A cached part counts only while its parents hold the bytes it was made from. A record remembers its
parents' digests, because an engine on a GPU need not return the same rows for the same request
twice.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qrpo.errors import ConfigError
from storage import Manifest, PartKey, PartRecord, Store, artifact_fingerprint, fingerprint


@dataclass(frozen=True)
class PartPlan:
    """One part to have: its key, the parent parts it reads, and which slice of the work it is.

    `reuse` names committed parts whose rows may serve here (see `tasks.reuse`).
    """

    key: PartKey
    inputs: tuple[PartKey, ...]
    slice: Mapping[str, Any] = field(default_factory=dict)
    reuse: tuple[PartKey, ...] = ()
    replace: bool = False
    """Whether the store has this part but it must be computed again: forced, or made from other
    bytes of its parents."""


@dataclass(frozen=True)
class StagePlan:
    """All parts of one stage for one configuration, and those that the store has (`records`, by
    fingerprint)."""

    stage: str
    family: str
    settings: Mapping[str, Any]
    outside: Mapping[str, Any]
    parts: tuple[PartPlan, ...]
    parents: Mapping[str, str]
    rows: Mapping[str, str] = field(default_factory=dict)
    """Which rows are asked for, by split: a hash that does not depend on how they are cut into
    parts."""
    records: Mapping[str, PartRecord] = field(default_factory=dict)
    artifact: str | None = None
    """The artifact's fingerprint where it does not follow from `rows`: one part, or parts that are
    not known before."""
    reads: str | None = None
    """The digest of the parents' rows together, where the part must have been made from exactly
    these in any cut."""
    known: bool = True
    """False until the prompts have been read: the parts are not known yet."""
    manifest: Manifest | None = None
    """The artifact's manifest, where the store had it and these are its parts."""

    @property
    def fingerprint(self) -> str:
        """The artifact's fingerprint."""
        return self.artifact or fingerprint(["artifact", self.stage, self.family, dict(self.rows)])

    @property
    def missing(self) -> tuple[PartPlan, ...]:
        """Parts that the store does not have, in order."""
        return tuple(part for part in self.parts if part.key.fingerprint not in self.records)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return self.known and len(self.records) == len(self.parts)

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the parts that the store has, by fingerprint."""
        return {name: record.digest for name, record in self.records.items()}

    def parts_of(self, split: str | None = None) -> list[PartPlan]:
        """The parts of one split, or all."""
        return [part for part in self.parts if split in (None, part.slice["split"])]

    def by_prompts(self) -> dict[str, list[PartPlan]]:
        """The parts by the fingerprint of the prompts part that they belong to."""
        parts: dict[str, list[PartPlan]] = {}
        for part in self.parts:
            parts.setdefault(part.slice["prompts"], []).append(part)
        return parts

    def with_records(self, store: Store, digests: Mapping[str, str], *, keep_cut: bool = True) -> "StagePlan":
        """This plan with what the store has for it; `digests` are those of all upstream parts, by
        fingerprint.

        A finished artifact keeps its own cut (unless `keep_cut` is false): its parts replace the
        planned ones where all were made from the present bytes of present parts. A record whose
        parent holds other bytes now is ignored, so its part is computed again.
        """
        manifest = (self.manifest or store.manifest(self.stage, self.fingerprint)) if keep_cut else None
        digests = {
            **digests,
            **{part.fingerprint: part.digest for part in (manifest.parts if manifest else ())},
        }
        if manifest is not None and all(
            digests.get(parent) == digest
            for part in manifest.parts
            for parent, digest in part.parents.items()
        ):
            planned = {part.key: part for part in self.parts}
            kept = tuple(planned.get(part.key, part) for part in as_planned(manifest.parts))
            records = {record.fingerprint: record for record in manifest.parts}
            return replace(self, parts=kept, records=records, manifest=manifest)
        found = store.find_parts([part.key for part in self.parts])
        fresh = {
            name: record
            for name, record in found.items()
            if not record.is_stale(digests)
            and (self.reads is None or record.metadata.get("reads", self.reads) == self.reads)
        }
        return replace(self, records=fresh, manifest=None)


@dataclass(frozen=True)
class Upstream:
    """What a stage plans from: the plans of earlier stages, the store, and the policy that a later
    round starts from."""

    plans: Mapping[str, StagePlan]
    store: Store
    previous_policy: PartRecord | None = None

    def __getitem__(self, stage: str) -> StagePlan:
        return self.plans[stage]

    def prompt_parts(self, split: str | None = None) -> list[PartPlan]:
        """The prompts parts that hold any prompt, of one split or both."""
        return [part for part in self["prompts"].parts_of(split) if part.slice["rows"]]

    @property
    def reference_identity(self) -> dict[str, Any]:
        """What identifies the reference policy: the fine-tuned artifact, or the given model's
        files."""
        reference = self["reference"]
        return {"artifact": reference.fingerprint} if reference.parts else dict(reference.outside["model"])

    @property
    def reference_inputs(self) -> tuple[PartKey, ...]:
        """The reference's part, for the inputs of stages that use the model; none where the model
        is given."""
        return tuple(part.key for part in self["reference"].parts)

    def parents(self, *stages: str) -> dict[str, str]:
        """The artifacts of these stages, for a stage's lineage; `reference` only where it was
        fine-tuned."""
        made = [stage for stage in stages if stage != "reference" or self["reference"].parts]
        return {stage: self[stage].fingerprint for stage in made}


def make_family(stage: str, version: int, settings: Mapping[str, Any], outside: Mapping[str, Any]) -> str:
    """The hash of everything that the parts of one stage share."""
    return fingerprint({"stage": stage, "version": version, "settings": settings, "outside": outside})


def part_key(stage: str, family: str, *inputs: Any) -> PartKey:
    """The key of the part of a family that is made from `inputs`: JSON values that name what it
    reads and its slice."""
    return PartKey(stage, family, fingerprint([family, *inputs]))


def single_part(stage: str, family: str, store: Store, *inputs: Any, earlier: PartKey) -> tuple[PartKey, str]:
    """The key of a stage's one part and its artifact's fingerprint.

    `earlier` is the key that the version before gave this part: it is kept where the store has that
    part and not the new one.
    """
    key = part_key(stage, family, *inputs)
    if store.part(key) is None and store.part(earlier) is not None:
        key = earlier
    return key, artifact_fingerprint(key.family, [key.fingerprint])


def add_digests(digests: Iterable[str]) -> str:
    """The sum of hexadecimal 256-bit digests modulo 2**256: one digest of a set of rows, in any
    order and any cut."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**256:064x}"


def previous_policy(from_run: str | None, store: Store) -> PartRecord | None:
    """The policy of the run `from_run` (`rounds.from_run`); None for a first round.

    Raises ConfigError where the store does not have it.
    """
    if from_run is None:
        return None
    noted = (store.run(from_run) or {}).get("stages", {}).get("policy")
    manifest = store.manifest("policy", noted["fingerprint"]) if noted else None
    if manifest is None:
        raise ConfigError(
            f"rounds.from_run: {store.url} has no policy of a run named {from_run!r}. Run it first, up to its policy"
        )
    return manifest.parts[0]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by their dotted path; an empty one is a leaf."""
    if isinstance(value, Mapping) and value:
        items: Iterator[tuple[str, Any]] = ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)) and value:
        items = ((str(index), item) for index, item in enumerate(value))
    else:
        return {path: value}
    return {
        key: leaf
        for name, item in items
        for key, leaf in flat(item, f"{path}.{name}" if path else name).items()
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key changed from old to new` for every leaf that differs; values in at most 60
    characters."""

    def short(value: Any) -> str:
        text = "nothing" if value is None else str(value)
        return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"

    return [
        f"{prefix}{key} changed from {short(old.get(key))} to {short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def as_planned(records: Iterable[PartRecord]) -> tuple[PartPlan, ...]:
    """Committed parts as parts of a plan; what they were made from is not asked for again."""
    return tuple(PartPlan(record.key, (), record.metadata) for record in records)
