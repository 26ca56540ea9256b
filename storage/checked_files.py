"""The tables of parts as an fsspec file system, for readers that open files themselves (pyarrow's datasets).

A file is fetched, with retries, and checked when it is opened.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem

from storage.contents import open_checked
from storage.parts import FileEntry, PartRecord
from storage.remote import Files


class CheckedFiles(AbstractFileSystem):  # type: ignore[misc]
    """Read-only; `entries` maps keys to the files and their parts."""

    cachable = False

    def __init__(self, files: Files, entries: Mapping[str, tuple[FileEntry, PartRecord]]) -> None:
        super().__init__()
        self._files, self._entries = files, entries

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """The file's size, as committed."""
        return {"name": path, "size": self._entries[path][0].bytes, "type": "file"}

    def _open(self, path: str, *_: Any, **__: Any) -> BinaryIO:
        file = open_checked(self._files, *self._entries[path])
        return open(file, "rb") if isinstance(file, Path) else file
