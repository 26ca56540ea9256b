"""Bytes by key in a local folder, with durable writes. `RemoteFiles` has the same methods.

A local write goes to a temporary file in the target folder, is flushed to the disk (fsync), then
gets its name in one atomic step (rename to replace, hard link to create), and the folder is
flushed. After a crash a key has its old content, its new content or none.

`create` and `create_from` never replace and say whether they created the key: the first writer
wins. So committed parts are immutable, even with two runs that do not know of each other.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from storage.crashpoints import crash_point
from storage.errors import StoreUnavailableError
from storage.names import TEMPORARY, check_key, is_key
from storage.processes import cache_folder, has_ended, temporary_name


@dataclass(frozen=True)
class FileInfo:
    """A listed file: key, size in bytes, last change in seconds since 1970 (None: unknown)."""

    key: str
    bytes: int
    modified: float | None


class LocalFiles:
    """Files under a local folder.

    A missing key raises FileNotFoundError, another failure StoreUnavailableError.
    """

    pauses: tuple[float, ...] = (0.0,)
    """Seconds to wait before each new attempt to read what seems damaged."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """The local path of a key."""
        return self.root / check_key(key)

    def read(self, key: str) -> bytes:
        """All bytes of a key."""
        with plain_errors(self.root, key):
            return self.path(key).read_bytes()

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The bytes of those keys that exist."""
        found = {}
        for key in keys:
            with suppress(FileNotFoundError):
                found[key] = self.read(key)
        return found

    def write(self, key: str, data: bytes) -> None:
        """Create or replace a key, atomically and durably."""
        with self._scratch(key) as scratch:
            _write(scratch, data, key)
            os.replace(scratch, self.path(key))
            crash_point("published", key)
            _sync(scratch.parent)
            crash_point("published-synced", key)

    def create(self, key: str, data: bytes) -> bool:
        """Create a key; False, without a change, where it exists."""
        with self._scratch(key) as scratch:
            _write(scratch, data, key)
            return self._publish(key, scratch)

    def scratch(self, key: str) -> Path:
        """A new local file name for the content of a key, for `create_from`."""
        with plain_errors(self.root, key, writing=True):
            folder = self.path(key).parent
            self._make_folder(folder, key)
            return folder / temporary_name()

    def create_from(self, key: str, scratch: Path) -> bool:
        """Create a key from a scratch file, which the caller removes; False where the key
        exists."""
        with plain_errors(self.root, key, writing=True):
            _sync(scratch)
            crash_point("scratch-synced", key)
            return self._publish(key, scratch)

    def copy_from(self, key: str, source: Path) -> bool:
        """Create a key with a copy of any local file; False where the key exists."""
        with self._scratch(key) as scratch:
            shutil.copyfile(source, scratch)
            crash_point("scratch-written", key)
            return self.create_from(key, scratch)

    @contextmanager
    def _scratch(self, key: str) -> Iterator[Path]:
        with plain_errors(self.root, key, writing=True):
            scratch = self.scratch(key)
            try:
                yield scratch
            finally:
                scratch.unlink(missing_ok=True)

    def _publish(self, key: str, scratch: Path) -> bool:
        target = self.path(key)
        try:
            os.link(scratch, target)
        except FileExistsError:
            return False
        except OSError as error:
            # some network and FAT-like file systems have no hard links: check, then rename
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
                raise
            if target.exists():
                return False
            os.replace(scratch, target)
        crash_point("published", key)
        _sync(target.parent)
        crash_point("published-synced", key)
        return True

    def _make_folder(self, folder: Path, key: str) -> None:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            try:
                folder.mkdir()
            except FileExistsError:
                if not folder.is_dir():
                    raise
            _sync(folder.parent)
            crash_point("folder-made", key)

    def size(self, key: str) -> int | None:
        """Size in bytes; None where there is no such key."""
        with plain_errors(self.root, key):
            try:
                return self.path(key).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def delete(self, key: str) -> None:
        """Delete a key; nothing happens where there is none."""
        with plain_errors(self.root, key):
            path = self.path(key)
            crash_point("delete-before", key)
            path.unlink(missing_ok=True)  # its folder stays: another writer may be about to use it
            with suppress(FileNotFoundError):
                _sync(path.parent)
            crash_point("delete-after", key)

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """Every file under a folder ("" for all), in the order of keys."""
        start = self.path(prefix) if prefix else self.root
        with plain_errors(self.root, prefix):
            for folder, folders, names in os.walk(start):
                folders.sort()
                within = Path(folder).relative_to(self.root).as_posix()
                for name in sorted(names):
                    key = name if within == "." else f"{within}/{name}"
                    if is_key(key):
                        with suppress(FileNotFoundError):  # deleted meanwhile
                            status = os.stat(os.path.join(folder, name))
                            yield FileInfo(key, status.st_size, status.st_mtime)

    def open_input(self, key: str, size: int | None = None) -> BinaryIO:
        """A readable, seekable binary file. `size`, the expected size, may save a request."""
        with plain_errors(self.root, key):
            return open(self.path(key), "rb")

    def open_ranges(self, key: str, size: int) -> BinaryIO:
        """The file of `size` bytes; only the ranges that are read are fetched."""
        return self.open_input(key)

    def sweep(self, older_than: float) -> Iterator[FileInfo]:
        """Remove and yield temporary files of killed writers, and all older than `older_than`
        seconds."""
        yield from sweep_machine(older_than)
        for folder, folders, names in os.walk(self.root):
            for name in [*names, *folders]:
                path = Path(folder, name)
                if info := sweep_temporary(path, older_than):
                    yield replace(info, key=path.relative_to(self.root).as_posix())


def sweep_machine(older_than: float) -> Iterator[FileInfo]:
    """Remove and yield such files and folders outside of stores: in TMPDIR, and in the user's
    cache."""
    for folder in (Path(tempfile.gettempdir()), cache_folder() / "folders"):
        for path in folder.glob(f"{TEMPORARY}*"):
            if info := sweep_temporary(path, older_than):
                yield info


def sweep_temporary(path: Path, older_than: float) -> FileInfo | None:
    """Remove a temporary file or folder whose writer has ended or that is older than `older_than`
    seconds."""
    if not path.name.startswith(TEMPORARY):
        return None
    try:
        status = path.stat()
        if not has_ended(path.name) and status.st_mtime > time.time() - older_than:
            return None
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except FileNotFoundError:  # its writer has finished, or another gc removed it
        return None
    return FileInfo(path.name, status.st_size, status.st_mtime)


def _write(path: Path, data: bytes, key: str) -> None:
    with open(path, "xb") as file:
        crash_point("scratch-opened", key)
        half = len(data) // 2
        file.write(data[:half])
        file.flush()
        crash_point("scratch-half", key)
        file.write(data[half:])
        file.flush()
        crash_point("scratch-written", key)
        os.fsync(file.fileno())
    crash_point("scratch-synced", key)


def _sync(path: Path) -> None:
    """Flush a file or a folder (the names in it) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_PERMISSIONS = "Check the folder's owner and permissions, or choose another store (--store, QRPO_STORE)."
_NOT_A_FOLDER = "A file is where a folder is needed: choose another store (--store, QRPO_STORE)."
_REMEDIES = {
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENOENT: "It cannot be created there: choose another store (--store, QRPO_STORE).",
    errno.ENOSPC: "The disk is full: free space (`qrpo gc` shows what no run needs) and start again.",
    errno.EDQUOT: "The disk quota is used up: free space and start again.",
    errno.EROFS: "The file system is read-only: choose another store (--store, QRPO_STORE).",
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EEXIST: _NOT_A_FOLDER,
}


@contextmanager
def plain_errors(root: Path, key: str, writing: bool = False) -> Iterator[None]:
    """Turn an OSError into a StoreUnavailableError; when reading, FileNotFoundError passes."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not writing:
            raise
        remedy = _REMEDIES.get(
            error.errno or 0, "Nothing committed is lost: fix the file system and start again."
        )
        where = f"{error.filename or key}: {error.strerror or error}"
        raise StoreUnavailableError(f"the store {root} failed at {where}. {remedy}") from error
