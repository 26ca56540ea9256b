"""The committed bytes of a part's files: checked by sha256, and read again before they count as
damaged.

A local file is hashed at its first use in a process, and again once its size, time or inode
changes. A file of an object store is hashed each time it is fetched. A difference raises
DamagedError with the name of the file and the remedy.
"""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from storage.errors import DamagedError
from storage.fingerprints import stream_digest
from storage.parts import FileEntry, PartRecord
from storage.remote import Files

T = TypeVar("T")

_IN_MEMORY = 64 << 20  # bytes: larger files are fetched to a temporary file
_THREADS = 8  # hashing releases Python's lock
_checked: dict[Path, tuple[str, int, int, int]] = {}


def again(files: Files, read: Callable[[], T]) -> T:
    """What `read` returns. It is called again, after pauses, where it raises DamagedError.

    A network may cut or alter a body, and an object store may answer with an old one for a while.
    """
    for pause in files.pauses:
        try:
            return read()
        except DamagedError:
            time.sleep(pause)
    return read()


def open_checked(files: Files, entry: FileEntry, record: PartRecord) -> Path | BinaryIO:
    """A file of a part: its path in a local store, otherwise a file in memory; raises
    DamagedError."""
    path = files.path(entry.key)
    if path is None:
        file = io.BytesIO() if entry.bytes <= _IN_MEMORY else tempfile.TemporaryFile()  # noqa: SIM115
        fetch(files, entry, record, cast(BinaryIO, file))
        return cast(BinaryIO, file)
    again(files, lambda: _check_local(files, entry, record, path))
    return path


def check_files(files: Files, entries: Iterable[tuple[FileEntry, PartRecord]]) -> None:
    """Check files of a local store, in threads; raises DamagedError for the first that differs."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="check") as pool:
        for _ in pool.map(lambda pair: open_checked(files, *pair), entries):
            pass


def fetch(files: Files, entry: FileEntry, record: PartRecord, target: BinaryIO) -> None:
    """Copy a file of a part into an empty open file and check it; raises DamagedError."""

    def copy() -> None:
        target.seek(0)
        target.truncate()
        try:
            with files.open_input(entry.key, entry.bytes) as source:
                shutil.copyfileobj(source, target, 4 << 20)
        except FileNotFoundError:
            check_size(record, entry, None)
        size = target.tell()
        target.seek(0)
        _compare(record, entry, size, target)
        target.seek(0)

    again(files, copy)


def _check_local(files: Files, entry: FileEntry, record: PartRecord, path: Path) -> None:
    try:
        with files.open_input(entry.key) as file:
            status = os.fstat(file.fileno())
            seen = (entry.sha256, status.st_size, status.st_mtime_ns, status.st_ino)
            if _checked.get(path) != seen:
                _compare(record, entry, status.st_size, file)
                _checked[path] = seen
    except FileNotFoundError:
        check_size(record, entry, None)


def check_size(record: PartRecord, entry: FileEntry, size: int | None) -> None:
    """Raise DamagedError where the size of a file (None: missing) is not the committed one."""
    if size != entry.bytes:
        found = "is missing" if size is None else f"has {size} bytes, {entry.bytes} were committed"
        raise damaged(record, entry, found)


def _compare(record: PartRecord, entry: FileEntry, size: int, file: BinaryIO) -> None:
    check_size(record, entry, size)
    try:
        digest = stream_digest(file)
    except OSError as error:  # a bad sector
        raise damaged(record, entry, f"cannot be read ({error.strerror})") from None
    if digest != entry.sha256:
        raise damaged(record, entry, f"has the sha256 {digest}, {entry.sha256} was committed")


def damaged(record: PartRecord, entry: FileEntry, fault: str) -> DamagedError:
    """The error for a file of a part, with the remedy."""
    return DamagedError(
        f"{record.key}: {entry.key} {fault}. `qrpo verify --repair` computes only this part again."
    )
