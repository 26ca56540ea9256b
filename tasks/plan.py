"""What a stage would do: its parts, their fingerprints, which of them the store already has, and why the others are missing.

A stage's *family* is the hash of its name, its version, the settings that matter to it and the identity of outside inputs
(model, reward source). A part's fingerprint is the hash of its family, of what it reads from its parents and of its slice. All
of that is known before anything is computed, so the plan of the whole pipeline follows from the prompts alone.

A cached part counts only while it was made from the very bytes that its parents hold now: a record remembers its parents'
digests, since what an engine on a GPU returns for the same request need not be the same twice.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from storage import Manifest, PartKey, PartRecord, Store, artifact_fingerprint, fingerprint

__all__ = ["PartPlan", "StagePlan", "changed_settings", "make_family"]


@dataclass(frozen=True)
class PartPlan:
    """One part to have: its key, the parent parts it reads, and which slice of the work it is.

    `reuse` names committed parts of the same family, cut differently, whose rows may serve here (see `tasks.reuse`).
    """

    key: PartKey
    inputs: tuple[PartKey, ...]
    slice: Mapping[str, Any] = field(default_factory=dict)
    reuse: tuple[PartKey, ...] = ()
    replace: bool = False
    """Whether the store has this part, but it must be computed again: forced, or made from other bytes of its parents."""


@dataclass(frozen=True)
class StagePlan:
    """All parts of one stage for one configuration, and those that the store has (`records`, by fingerprint)."""

    stage: str
    family: str
    settings: Mapping[str, Any]
    outside: Mapping[str, Any]
    parts: tuple[PartPlan, ...]
    parents: Mapping[str, str]
    records: Mapping[str, PartRecord] = field(default_factory=dict)
    artifact: str | None = None
    known: bool = True
    """False until the prompts have been read: nobody can say yet which parts there will be."""

    @property
    def fingerprint(self) -> str:
        """The artifact's fingerprint: what was asked, part by part. `artifact` says it where the parts are not known before."""
        return self.artifact or artifact_fingerprint(
            self.family, [part.key.fingerprint for part in self.parts]
        )

    @property
    def missing(self) -> tuple[PartPlan, ...]:
        """Parts that the store does not have, in order."""
        return tuple(part for part in self.parts if part.key.fingerprint not in self.records)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return self.known and len(self.records) == len(self.parts)

    def with_records(self, store: Store, digests: Mapping[str, str]) -> "StagePlan":
        """This plan with what the store has for it; `digests` are the parents' present ones, by fingerprint.

        A record whose parent has other bytes now than when it was made is left out: its part will be computed again.
        """
        manifest = store.manifest(self.stage, self.fingerprint)
        noted = [] if manifest is None else list(manifest.parts)
        if manifest is None or any(record.is_stale(digests) for record in noted):
            # no manifest yet, or a part was computed again after it was written: the parts' own records tell
            noted = list(store.find_parts([part.key for part in self.parts]).values())
        fresh = {record.fingerprint: record for record in noted if not record.is_stale(digests)}
        return replace(self, records=fresh)


def make_family(stage: str, version: int, settings: Mapping[str, Any], outside: Mapping[str, Any]) -> str:
    """The hash of everything that parts of one stage share."""
    return fingerprint({"stage": stage, "version": version, "settings": settings, "outside": outside})


def changed_settings(plan: StagePlan, previous: Manifest | None) -> list[str]:
    """In words, how this plan's settings and outside inputs differ from those of an earlier artifact."""
    if previous is None:
        return []
    before = _flat({**previous.config, **previous.inputs})
    after = _flat({**plan.settings, **plan.outside})
    words = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old != new:
            words.append(f"{key} changed from {_short(old)} to {_short(new)}")
    return words


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[str, Any]] = ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)) and value:
        items = ((str(index), item) for index, item in enumerate(value))
    else:
        return {path: value}
    return {
        key: leaf
        for name, item in items
        for key, leaf in _flat(item, f"{path}.{name}" if path else name).items()
    }


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
