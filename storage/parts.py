"""The part: the unit of work, caching and commit. It is committed once its JSON record exists.

    parts/<stage>/<family>/<fingerprint>.parquet     the rows
    parts/<stage>/<family>/<fingerprint>.json        the record, written last
    rejects/<stage>/<family>/<fingerprint>-<sha>.parquet    rejected rows, if any
    parts/<stage>/<family>/<fingerprint>/<sha>/...   instead of rows: files of a model folder

<sha> is the start of a sha256 over the payload. So a file that a killed or slower run left behind
is never taken for one of another payload.
"""

import builtins
import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

from storage.errors import DamagedError
from storage.fingerprints import canonical_json, plain_json
from storage.names import check_key, check_name, environment_secrets, redact


@dataclass(frozen=True)
class PartKey:
    """Identifies a part: stage, family (shared by all parts of an artifact), fingerprint."""

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
        """The key of the rejected rows of a payload with this sha256."""
        return f"rejects/{self.stage}/{self.family}/{self.fingerprint}-{sha256[:12]}.parquet"

    def __str__(self) -> str:
        return f"{self.stage} part {self.fingerprint}"


@dataclass(frozen=True)
class FileEntry:
    """One stored file: its name within the part, key in the store, size in bytes, sha256."""

    name: str
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartRecord:
    """A committed part and its provenance. `parents`: fingerprint of a parent part -> digest.

    `checked`: its writer checked the bytes of its parents against these digests when it read them,
    and wrote page checksums. Earlier versions did neither.
    """

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
    checked: bool = False

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
        """The file with the rejected rows; None where there are none."""
        return next((file for file in self.files if file.key.startswith("rejects/")), None)

    @property
    def payload(self) -> tuple[FileEntry, ...]:
        """All files except the rejects."""
        return tuple(file for file in self.files if not file.key.startswith("rejects/"))

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)

    @cached_property
    def digest(self) -> str:
        """The sha256 over the payload's names and digests: it identifies the computed bytes."""
        return hashlib.sha256(canonical_json([[file.name, file.sha256] for file in self.payload])).hexdigest()

    def is_stale(self, digests: Mapping[str, str]) -> bool:
        """Whether a parent part (fingerprint -> digest) has changed since this part was computed.

        This happens when a damaged parent is computed again and its stage is not deterministic (GPU
        kernels): fingerprints stay, but what was computed from the old bytes must be computed
        again.
        """
        return any(digests.get(parent, digest) != digest for parent, digest in self.parents.items())

    def to_file(self) -> builtins.bytes:
        """The content of the record's file."""
        return dump_checksummed(self.to_json())

    @classmethod
    def from_file(cls, data: builtins.bytes, key: PartKey) -> "PartRecord":
        """The record in the file of this key; raises DamagedError where it was edited or moved."""
        value = load_checksummed(data, f"the record {key.record}")
        try:
            record = cls.from_json(value)
        except (TypeError, KeyError, ValueError) as error:
            raise DamagedError(f"{key.record} is not a part's record of this version: {error}.") from None
        if record.key != key:
            raise DamagedError(
                f"{key.record} is the record of {record.key}: it was moved or copied there by hand."
            )
        return record

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        files = [list(astuple(file)) for file in self.files]
        return {**fields, "files": files, "parents": dict(self.parents), "metadata": dict(self.metadata)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PartRecord":
        """The record of such values; raises KeyError, TypeError or ValueError for others."""
        files = tuple(
            FileEntry(name, check_key(key), int(size), sha256) for name, key, size, sha256 in value["files"]
        )
        record = cls(**{**value, "files": files})
        assert record.key
        return record


def dump_checksummed(value: dict[str, Any], indent: int | None = None) -> bytes:
    """The JSON text of a value with its sha256 in the field `sha256`, which detects edits.

    Credentials of this process and those in URLs are redacted, wherever they are in the value.
    """
    value = json.loads(redact(canonical_json(value).decode(), environment_secrets()))
    value = {**value, "sha256": _checksum(value)}
    return (
        json.dumps(value, indent=indent, sort_keys=True).encode() if indent else plain_json(value)
    ) + b"\n"


def load_checksummed(data: bytes, where: str) -> dict[str, Any]:
    """The value in such a text; raises DamagedError where it is not JSON or was changed."""
    try:
        value = json.loads(data)
        intact = value.pop("sha256") == _checksum(value)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(
            f"{where} is not readable ({type(error).__name__}). "
            "`qrpo verify --repair` computes what it described again."
        ) from None
    if not intact:
        raise DamagedError(
            f"{where} was changed after it was written: its sha256 does not match. Undo the edit, or let "
            "`qrpo verify --repair` compute what it described again."
        )
    assert isinstance(value, dict)
    return value


def _checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(plain_json(value)).hexdigest()
