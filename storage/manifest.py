"""The manifest of an artifact: the result of one stage with its provenance, written last.

It embeds the records of its parts, so a fully cached stage costs one read, and a plan, a listing or
a reader never opens the records of parts. Key: `artifacts/<stage>/<fingerprint>/manifest.json`.
"""

import builtins
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from storage.errors import DamagedError
from storage.fingerprints import fingerprint
from storage.names import check_name
from storage.parts import PartRecord, dump_checksummed, load_checksummed


@dataclass(frozen=True)
class Manifest:
    """One artifact. `inputs` identifies outside inputs, `parents` are artifacts by stage."""

    stage: str
    fingerprint: str
    family: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    parents: Mapping[str, str]
    parts: tuple[PartRecord, ...]
    rows: int
    bytes: int
    rejects: int
    code_version: str = ""
    created: str = ""
    seconds: float = 0.0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The manifest's key in the store."""
        return manifest_key(self.stage, self.fingerprint)

    @property
    def rejects_key(self) -> str:
        """The key of the table with the rejects of all parts, if there are any."""
        return self.key.removesuffix("manifest.json") + "rejects.parquet"

    def to_file(self) -> builtins.bytes:
        """The content of the manifest's file."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
        return dump_checksummed({**plain, "parts": [part.to_json() for part in self.parts]})

    @classmethod
    def from_file(cls, data: builtins.bytes, where: str) -> "Manifest":
        """The manifest in such a file; raises DamagedError."""
        value = load_checksummed(data, where)
        try:
            return cls(**{**value, "parts": tuple(PartRecord.from_json(part) for part in value["parts"])})
        except (TypeError, KeyError, ValueError) as error:
            raise DamagedError(
                f"{where} is not a manifest of this version: {error}. Run the stage again."
            ) from None


def manifest_key(stage: str, artifact: str) -> str:
    """The key of an artifact's manifest."""
    return f"artifacts/{check_name(stage, 'stage')}/{check_name(artifact, 'fingerprint')}/manifest.json"


def artifact_fingerprint(family: str, parts: Iterable[str]) -> str:
    """The fingerprint of an artifact with this family and these parts, in order."""
    return fingerprint(["artifact", family, list(parts)])


def manifest_of(
    stage: str,
    family: str,
    parts: Iterable[PartRecord],
    *,
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    parents: Mapping[str, str] | None = None,
    seconds: float = 0.0,
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of these parts, with its fingerprint and totals."""
    records = tuple(parts)
    return Manifest(
        stage=stage,
        fingerprint=artifact_fingerprint(family, [part.fingerprint for part in records]),
        family=family,
        config=config or {},
        inputs=inputs or {},
        parents=parents or {},
        parts=records,
        rows=sum(part.rows for part in records),
        bytes=sum(part.bytes for part in records),
        rejects=sum(part.rejects for part in records),
        code_version=code_version(),
        created=now(),
        seconds=round(seconds, 3),
        metadata=metadata or {},
    )


@lru_cache(1)
def code_version() -> str:
    """The installed version of this project."""
    from importlib import metadata as packages  # slow to import, and only a writer needs it

    try:
        return packages.version("qrpo-pipeline")
    except packages.PackageNotFoundError:
        return "unknown"


def now() -> str:
    """The current time, UTC, in ISO 8601. For people; no code depends on it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
