"""The store: immutable, content-keyed artifacts on any fsspec URL.

    parts/        payloads and, written last, their records        rejects/      rows left out, beside their parts
    artifacts/    manifests: one stage's whole result              runs/         names for what a run produced
    leases/       who works on what just now                       work/         scratch that survives a kill

This is the whole surface in one class; how a part is committed is in `storage.commit`, how bytes become durable in
`storage.files`, how a manifest looks in `storage.manifest`. What was left out: no index, no database, no listing on
the way of a run, so nothing that can disagree with the files.
"""

import builtins
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from storage import commit, read
from storage.errors import DamagedError, StoreURLError
from storage.files import FileInfo, Files, LocalFiles
from storage.manifest import Manifest, manifest_key
from storage.names import check_key, check_name, public_url
from storage.parts import PartKey, PartRecord, without_secrets
from storage.remote import RemoteFiles
from storage.table import Table

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Store"]


class Store:
    """A folder, bucket or memory full of artifacts.

    `url` is a local path, `file://`, `s3://`, `gs://`, `memory://` or any other fsspec URL; `storage_options` go to
    fsspec. Credentials come from the environment or fsspec's configuration: a URL that carries some is refused.
    """

    def __init__(self, url: str | Path, **storage_options: Any) -> None:
        text = public_url(str(url))
        protocol, separator, rest = text.partition("://")
        if not separator or protocol in ("file", "local"):
            root = Path(rest if separator else text).expanduser().absolute()
            self.url = str(root)
            self.files: Files = LocalFiles(root)
            return
        self.files = _remote(protocol, text, storage_options)
        self.url = text.rstrip("/")

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    # Bytes by key

    def read_bytes(self, key: str) -> bytes:
        """All bytes of a key; raises FileNotFoundError."""
        return self.files.read(key)

    def write_bytes(self, key: str, data: bytes) -> None:
        """Create or replace a key, atomically and durably."""
        self.files.write(key, data)

    def exists(self, key: str) -> bool:
        """Whether there is such a key."""
        return self.files.size(key) is not None

    def delete(self, key: str) -> None:
        """Delete a key; nothing happens where there is none."""
        self.files.delete(key)

    def open_input(self, key: str) -> BinaryIO:
        """A key's bytes as a readable, seekable file; raises FileNotFoundError."""
        return self.files.open_input(key)

    def url_of(self, key: str) -> str:
        """Where other programs find a key: a local path, or a URL without credentials."""
        return f"{self.url}/{check_key(key)}"

    def local_path(self, key: str) -> Path | None:
        """The key's path in a local store; None in any other."""
        return self.files.path(key)

    # Parts

    def commit_part(
        self,
        key: PartKey,
        tables: pa.Table | Iterable[pa.Table],
        *,
        table: Table | None = None,
        rejects: commit.Rejects = None,
        parents: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        replace: bool = False,
    ) -> PartRecord:
        """Write a part's rows and commit it; raises SchemaError where they do not satisfy `table`.

        Without a `table` any rows are accepted. `tables` may be an iterator: row groups are written as they fill. `rejects` may be a function that is called
        after the last row. A part that is committed already stays as it is and its record is returned, unless
        `replace`: then it goes once the new rows are all there.
        """
        return commit.commit_part(
            self.files,
            key,
            tables,
            table=table,
            rejects=rejects,
            parents=parents,
            metadata=metadata,
            seconds=seconds,
            replace=replace,
        )

    def commit_folder(
        self,
        key: PartKey,
        folder: Path,
        *,
        rows: int = 0,
        parents: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        replace: bool = False,
    ) -> PartRecord:
        """Copy a local folder (a trained model) into the store as one part and commit it."""
        return commit.commit_folder(
            self.files,
            key,
            Path(folder),
            rows=rows,
            parents=parents,
            metadata=metadata,
            seconds=seconds,
            replace=replace,
        )

    def discard_part(self, key: PartKey) -> None:
        """Take a part out of the store, so that the next run computes it again."""
        commit.discard_part(self.files, key)

    def part(self, key: PartKey) -> PartRecord | None:
        """The record of a committed part; None where it is not committed."""
        return commit.load_record(self.files, key)

    def find_parts(self, keys: Iterable[PartKey]) -> dict[str, PartRecord]:
        """Which of these parts are committed: fingerprint -> record. Reads side by side, lists nothing."""
        wanted = {key.record: key for key in keys}
        found = self.files.read_many(wanted)
        return {
            wanted[name].fingerprint: commit.parse_record(data, wanted[name]) for name, data in found.items()
        }

    def family_parts(self, stage: str, family: str) -> builtins.list[PartRecord]:
        """All committed parts of a family, by a listing, in the order of fingerprints."""
        prefix = f"parts/{check_name(stage, 'stage')}/{check_name(family, 'family')}"
        names = [
            info.key.removeprefix(f"{prefix}/").removesuffix(".json")
            for info in self.files.list(prefix)
            if info.key.endswith(".json") and "/" not in info.key.removeprefix(f"{prefix}/")
        ]
        return builtins.list(self.find_parts(PartKey(stage, family, name) for name in names).values())

    def read_part(
        self, record: PartRecord, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()
    ) -> pa.Table:
        """A part's rows; raises DamagedError where the file is not what was committed.

        The text columns `encoded` come as dictionaries, which is quick where their values repeat.
        """
        return read.read_table(self.files, record, columns, encoded)

    def read_rejects(self, record: PartRecord) -> pa.Table:
        """The rows that a part left out, with reasons."""
        return read.read_rejects(self.files, record)

    def scan(self, records: Iterable[PartRecord]) -> "pl.LazyFrame":
        """The rows of many parts as one polars LazyFrame."""
        return read.scan(self.files, records)

    def fetch_folder(self, record: PartRecord, into: Path | None = None) -> Path:
        """A local folder with a folder part's files, verified; in a local store the stored folder itself."""
        return read.fetch_folder(self.files, record, into)

    # Artifacts and runs

    def commit_manifest(self, manifest: Manifest) -> Manifest:
        """Write an artifact's manifest, after the rejects of its parts in one table; the manifest that is there then."""
        existing = None
        with suppress(DamagedError):  # a damaged one is written anew
            existing = self.manifest(manifest.stage, manifest.fingerprint)
        if existing is not None and existing.parts == manifest.parts:
            return existing
        if any(part.rejects for part in manifest.parts):
            import pyarrow.parquet as pq

            sink = pa.BufferOutputStream()
            pq.write_table(
                pa.concat_tables(self.read_rejects(part) for part in manifest.parts), sink, compression="zstd"
            )
            self.files.write(manifest.rejects_key, sink.getvalue().to_pybytes())
        data = manifest.to_file()
        self.files.write(manifest.key, data)
        return Manifest.from_file(data, manifest.key)

    def manifest(self, stage: str, fingerprint: str) -> Manifest | None:
        """An artifact's manifest, by one read; None where the artifact is not complete."""
        key = manifest_key(stage, fingerprint)
        try:
            data = self.files.read(key)
        except FileNotFoundError:
            return None
        return Manifest.from_file(data, key)

    def write_run(self, name: str, run: Mapping[str, Any]) -> None:
        """Name what a run produced: `runs/<name>.json`, replaced as the run goes on."""
        text = json.dumps(dict(run), indent=2, sort_keys=True, allow_nan=False)
        self.files.write(f"runs/{check_name(name, 'run name')}.json", without_secrets(text.encode()) + b"\n")

    def run(self, name: str) -> dict[str, Any] | None:
        """What a run noted; None where there is no such run."""
        key = f"runs/{check_name(name, 'run name')}.json"
        try:
            value = json.loads(self.files.read(key))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedError(
                f"{key} is not JSON ({error}). Undo the edit, or run that configuration again."
            ) from None
        assert isinstance(value, dict)
        return value

    def runs(self) -> builtins.list[str]:
        """The names of all runs, by a listing."""
        keys = (info.key for info in self.files.list("runs"))
        return [key.removeprefix("runs/").removesuffix(".json") for key in keys if key.endswith(".json")]

    # Scratch

    def work_dir(self, key: PartKey) -> Path:
        """A local folder that survives a kill, for a part in the making (training checkpoints)."""
        folder = self._work_dir(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear_work(self, key: PartKey) -> None:
        """Remove a part's scratch folder."""
        shutil.rmtree(self._work_dir(key), ignore_errors=True)

    def _work_dir(self, key: PartKey) -> Path:
        local = self.files.path(f"work/{key.stage}/{key.fingerprint}")
        place = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return local or read.cache_folder() / "work" / place / key.stage / key.fingerprint

    def listing(self, prefix: str = "") -> Iterator[FileInfo]:
        """Every file under a folder with its size and time; for housekeeping, not on the way of a run."""
        return self.files.list(prefix)

    def list(self, prefix: str = "") -> builtins.list[str]:
        """The keys of every file under a folder, sorted."""
        return [info.key for info in self.files.list(prefix)]


def _remote(protocol: str, url: str, options: dict[str, Any]) -> RemoteFiles:
    import fsspec

    if "::" in protocol or protocol not in fsspec.available_protocols():
        raise StoreURLError(
            f"the store's URL {url} has the protocol {protocol!r}, which fsspec does not know. "
            "Use a local path, file://, s3://, gs:// or memory://."
        )
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise StoreURLError(
            f"the store's URL {url} needs a package that is not installed: {error}."
        ) from None
    root = kind._strip_protocol(url)
    if not url.partition("://")[2].strip("/"):
        raise StoreURLError(
            f"the store's URL {url} names no bucket or folder. Write {protocol}://NAME/FOLDER."
        )
    return RemoteFiles(protocol, root.rstrip("/"), {**kind._get_kwargs_from_urls(url), **options})
