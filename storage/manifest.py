"""The manifest: one stage's whole result, and everything that made it. Its existence is the artifact's completion.

It embeds the records of its parts, so that a fully cached stage costs one read, and a plan, a listing or a reader
never has to open the parts' own records. `artifacts/<stage>/<fingerprint>/manifest.json`.
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
from storage.parts import PartRecord, sealed, unsealed

__all__ = ["Manifest", "artifact_fingerprint", "code_version", "manifest_of", "now"]


@dataclass(frozen=True)
class Manifest:
    """One artifact. `inputs` are the identities of outside inputs, `parents` the artifacts that it was made from."""

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
        """The key of the rejects of all parts in one table, where there are any."""
        return self.key.removesuffix("manifest.json") + "rejects.parquet"

    def to_file(self) -> builtins.bytes:
        """The manifest's file."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
        return sealed({**plain, "parts": [part.to_json() for part in self.parts]})

    @classmethod
    def from_file(cls, data: builtins.bytes, where: str) -> "Manifest":
        """The manifest in such a file; raises DamagedError."""
        value = unsealed(data, where)
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
    """The artifact's fingerprint: of its family and its parts' fingerprints, in order."""
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
    """The manifest of these parts, with its fingerprint and totals worked out."""
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
    """The installed version of this project, as manifests and records note it."""
    from importlib import metadata as packages  # slow to import, and only a writer needs it

    try:
        return packages.version("qrpo-pipeline")
    except packages.PackageNotFoundError:
        return "unknown"


def now() -> str:
    """The time as records and manifests note it: UTC, ISO 8601, seconds. For people; nothing is decided by it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
