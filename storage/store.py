"""The store: immutable, content-keyed artifacts on any fsspec URL.

    parts/        payloads, and their records, which are written last
    rejects/      rejected rows of parts
    artifacts/    manifests: one stage's whole result
    runs/         what each run produced
    leases/       which process works on which part
    work/         scratch folders that survive a kill

There is no index and no database. What a run finds and commits depends on no listing, so nothing
can disagree with the files.
"""

import builtins
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.commit import PartWriter
from storage.contents import again
from storage.errors import DamagedError, StoreURLError
from storage.files import FileInfo, LocalFiles
from storage.manifest import Manifest, manifest_key
from storage.names import TEMPORARY, check_key, check_name, public_url
from storage.parts import PartKey, dump_checksummed, load_checksummed
from storage.processes import cache_folder
from storage.read import PartReader
from storage.remote import RemoteFiles


class Store(PartWriter, PartReader):
    """A folder, bucket or memory file system with artifacts.

    `url` is a local path, `file://`, `s3://`, `gs://`, `memory://` or any other fsspec URL;
    `storage_options` go to fsspec. Credentials come from the environment or fsspec's configuration;
    a URL with credentials is refused.
    """

    def __init__(self, url: str | Path, **storage_options: Any) -> None:
        text = public_url(str(url))
        protocol, separator, rest = text.partition("://")
        if not separator or protocol in ("file", "local"):
            root = Path(rest if separator else text).expanduser().absolute()
            self.url = str(root)
            self.files = LocalFiles(root)
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
        """The local path of a key or its URL without credentials, for other programs."""
        return f"{self.url}/{check_key(key)}"

    def local_path(self, key: str) -> Path | None:
        """The key's path in a local store; None in any other."""
        return self.files.path(key)

    # Artifacts and runs

    def commit_manifest(self, manifest: Manifest) -> Manifest:
        """Write the rejects of all parts as one table, then the manifest; returns the stored
        one."""
        existing = None
        with suppress(DamagedError):  # a damaged manifest is replaced
            existing = self.manifest(manifest.stage, manifest.fingerprint)
        if existing is not None and existing.parts == manifest.parts:
            return existing
        if any(part.rejects for part in manifest.parts):
            rejects = pa.concat_tables(self.read_rejects(part) for part in manifest.parts)
            sink = pa.BufferOutputStream()
            pq.write_table(rejects, sink, compression="zstd", write_page_checksum=True)
            self.files.write(manifest.rejects_key, sink.getvalue().to_pybytes())
        data = manifest.to_file()
        self.files.write(manifest.key, data)
        return Manifest.from_file(data, manifest.key)

    def manifest(self, stage: str, fingerprint: str) -> Manifest | None:
        """An artifact's manifest; None where the artifact is not complete."""
        key = manifest_key(stage, fingerprint)
        try:
            return again(self.files, lambda: Manifest.from_file(self.files.read(key), key))
        except FileNotFoundError:
            return None

    def write_run(self, name: str, run: Mapping[str, Any]) -> None:
        """Write what a run produced so far to `runs/<name>.json`, replacing it."""
        self.files.write(_run_key(name), dump_checksummed(dict(run), indent=2))

    def run(self, name: str) -> dict[str, Any] | None:
        """What `write_run` wrote; None where there is no such run."""
        try:
            return self.read_note(_run_key(name))
        except FileNotFoundError:
            return None

    def read_note(self, key: str) -> dict[str, Any]:
        """A JSON object with a checksum. Earlier versions wrote none: such a note is read twice.

        Raises FileNotFoundError, and DamagedError where it is none or was changed.
        """

        def read() -> dict[str, Any]:
            data = self.files.read(key)
            try:
                value = json.loads(data)
                if isinstance(value, dict) and "sha256" in value:
                    return load_checksummed(data, key)
                if isinstance(value, dict) and self.files.read(key) == data:
                    return value
                found = f"is a JSON {type(value).__name__}, expected an object with its sha256"
            except ValueError as error:
                found = f"is not JSON ({error})"
            except DamagedError:
                found = "was changed after it was written: its sha256 does not match"
            raise DamagedError(
                f"{key} {found}. Undo the edit, or let `qrpo verify --repair` set the file aside and run that "
                "configuration again."
            )

        return again(self.files, read)

    def set_aside_run(self, name: str) -> None:
        """Rename a damaged note to `runs/<name>.damaged`, so that the run can be noted anew."""
        key = _run_key(name)
        self.files.write(f"{key.removesuffix('.json')}.damaged", self.files.read(key))
        self.files.delete(key)

    def runs(self) -> builtins.list[str]:
        """The names of all runs, by a listing."""
        keys = (info.key for info in self.files.list("runs"))
        return [key.removeprefix("runs/").removesuffix(".json") for key in keys if key.endswith(".json")]

    # Scratch

    def work_dir(self, key: PartKey, holder: str = "") -> Path:
        """A local folder that survives a kill, for training checkpoints of an unfinished part.

        The folder of a `holder` is named after it. A new holder gets the files of the one before by
        one rename, so that no two write to one folder.
        """
        folder = self._work_dir(key)
        mine = folder / f"{_HOLDER}{holder}" if holder else folder
        if not mine.is_dir():
            before = sorted(folder.glob(f"{_HOLDER}*"), key=lambda path: path.stat().st_mtime)
            if before:
                before[-1].rename(mine)
            elif holder and folder.is_dir():  # written by an earlier release
                folder.rename(written := folder.with_name(f"{folder.name}.{holder}"))
                folder.mkdir()
                written.rename(mine)
        mine.mkdir(parents=True, exist_ok=True)
        return mine

    def clear_work(self, key: PartKey) -> None:
        """Remove a part's scratch folder."""
        shutil.rmtree(self._work_dir(key), ignore_errors=True)

    def work_folders(self) -> Iterator[tuple[str, str, Path]]:
        """(stage, part's fingerprint, folder) of every scratch folder on this machine."""
        for folder in sorted(self._work_root().glob("*/*")):
            if not folder.parent.name.startswith(TEMPORARY):
                yield folder.parent.name, folder.name, folder

    def _work_dir(self, key: PartKey) -> Path:
        return self._work_root() / key.stage / key.fingerprint

    def _work_root(self) -> Path:
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return self.files.path("work") or cache_folder() / "work" / name

    def listing(self, prefix: str = "") -> Iterator[FileInfo]:
        """Every file under a folder with its size and time. For housekeeping: a run lists
        nothing."""
        return self.files.list(prefix)

    def list(self, prefix: str = "") -> builtins.list[str]:
        """The keys of every file under a folder, sorted."""
        return [info.key for info in self.files.list(prefix)]


_HOLDER = "holder-"


def _run_key(name: str) -> str:
    return f"runs/{check_name(name, 'run name')}.json"


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
