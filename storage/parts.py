"""The part: the unit of work, of caching and of commit, and the small JSON record whose existence is its commit.

    parts/<stage>/<family>/<fingerprint>.parquet     the rows
    parts/<stage>/<family>/<fingerprint>.json        the record, written last
    rejects/<stage>/<family>/<fingerprint>-<sha>.parquet    rows left out, where there are any
    parts/<stage>/<family>/<fingerprint>/<sha>/...   in place of rows: the files of a folder (a trained model)

Rejects and folders carry the first digits of their part's sha256 in their names: whatever a killed or slower run left
behind then belongs to its own contents and can never be mistaken for another's.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from storage.errors import DamagedError
from storage.fingerprints import canonical_json, plain_json
from storage.names import check_key, check_name, environment_secrets, redact

__all__ = ["FileEntry", "PartKey", "PartRecord", "sealed", "unsealed", "without_secrets"]


@dataclass(frozen=True)
class PartKey:
    """Which part: its stage, its family (what all parts of one artifact share) and its own fingerprint."""

    stage: str
    family: str
    fingerprint: str

    def __post_init__(self) -> None:
        check_name(self.stage, "stage")
        check_name(self.family, "family")
        check_name(self.fingerprint, "fingerprint")

    @property
    def folder(self) -> str:
        """The key of the folder that a model part's files are under."""
        return f"parts/{self.stage}/{self.family}/{self.fingerprint}"

    @property
    def table(self) -> str:
        """The key of the part's rows."""
        return f"{self.folder}.parquet"

    @property
    def record(self) -> str:
        """The key of the part's record."""
        return f"{self.folder}.json"

    def rejects(self, sha256: str) -> str:
        """The key of the rows left out beside a payload with this sha256."""
        return f"rejects/{self.stage}/{self.family}/{self.fingerprint}-{sha256[:12]}.parquet"

    def __str__(self) -> str:
        return f"{self.stage} part {self.fingerprint}"


@dataclass(frozen=True)
class FileEntry:
    """One stored file: its name within the part, its key in the store, its size in bytes and its sha256."""

    name: str
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartRecord:
    """What a committed part is and what made it. `parents` maps parent parts' fingerprints to their digests."""

    stage: str
    family: str
    fingerprint: str
    files: tuple[FileEntry, ...]
    rows: int
    rejects: int
    parents: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    code_version: str = ""
    created: str = ""
    seconds: float = 0.0

    @cached_property
    def key(self) -> PartKey:
        """The part's key."""
        return PartKey(self.stage, self.family, self.fingerprint)

    @property
    def table(self) -> FileEntry | None:
        """The file with the rows; None for a folder."""
        return next((file for file in self.files if file.key == self.key.table), None)

    @property
    def rejects_file(self) -> FileEntry | None:
        """The file with the rows left out; None where there are none."""
        return next((file for file in self.files if file.key.startswith("rejects/")), None)

    @property
    def payload(self) -> tuple[FileEntry, ...]:
        """All files but the rejects."""
        return tuple(file for file in self.files if not file.key.startswith("rejects/"))

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)

    @cached_property
    def digest(self) -> str:
        """The sha256 over the payload's names and digests: what came, where the fingerprint says what was asked."""
        return hashlib.sha256(canonical_json([[file.name, file.sha256] for file in self.payload])).hexdigest()

    def is_stale(self, digests: Mapping[str, str]) -> bool:
        """Whether a parent part (fingerprint -> digest now) holds other bytes than this part was made from.

        That comes of computing a damaged parent again where its stage is not deterministic (GPU kernels): the
        fingerprints stay, and what was made from the old bytes must be made again.
        """
        return any(digests.get(parent, digest) != digest for parent, digest in self.parents.items())

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {
            "stage": self.stage,
            "family": self.family,
            "fingerprint": self.fingerprint,
            "files": [[file.name, file.key, file.bytes, file.sha256] for file in self.files],
            "rows": self.rows,
            "rejects": self.rejects,
            "parents": dict(self.parents),
            "metadata": dict(self.metadata),
            "code_version": self.code_version,
            "created": self.created,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PartRecord":
        """The record of such values; raises KeyError, TypeError or ValueError where they are not a record."""
        files = tuple(
            FileEntry(name, check_key(key), int(size), sha256) for name, key, size, sha256 in value["files"]
        )
        record = cls(**{**value, "files": files})
        assert record.key
        return record


def sealed(value: dict[str, Any]) -> bytes:
    """The JSON text of a value with its own sha256 inside, so that an edit by hand is found.

    Credentials of this process, and those in URLs, do not go in, wherever in the value they were.
    """
    value = json.loads(without_secrets(canonical_json(value)))
    seal = hashlib.sha256(plain_json(value)).hexdigest()
    return json.dumps({**value, "sha256": seal}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def without_secrets(text: bytes) -> bytes:
    """A JSON text without the credentials of this process and those in URLs."""
    return redact(text.decode(), environment_secrets()).encode()


def unsealed(data: bytes, where: str) -> dict[str, Any]:
    """The value in such a text; raises DamagedError where it is not JSON or not what was sealed."""
    try:
        value = json.loads(data)
        seal = value.pop("sha256")
        intact = hashlib.sha256(plain_json(value)).hexdigest() == seal
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(
            f"{where} is not readable ({type(error).__name__}). `qrpo verify --repair` computes again what it described."
        ) from None
    if not intact:
        raise DamagedError(
            f"{where} was changed after it was written: its own sha256 does not match. Undo the edit, or let "
            "`qrpo verify --repair` compute again what it described."
        )
    assert isinstance(value, dict)
    return value
