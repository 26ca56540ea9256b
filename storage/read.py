"""Reads committed parts and checks sizes and row counts; `storage.verify` checks every byte.

A difference raises DamagedError with the name of the file.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import DamagedError, StoreError
from storage.files import Files
from storage.fingerprints import file_digest
from storage.parts import FileEntry, PartRecord
from storage.remote import RemoteFiles
from storage.table import REJECTS

if TYPE_CHECKING:
    import polars as pl
    import pyarrow.dataset as ds

__all__ = ["PartReader", "cache_folder", "open_table"]

_SMALL = 1 << 20  # bytes: one request for a whole smaller file is quicker than several for ranges
_REMEDY = "`qrpo verify --repair` computes only this part again."


class PartReader:
    """Reads parts. `Store` inherits these methods."""

    files: Files

    def read_part(
        self, record: PartRecord, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()
    ) -> pa.Table:
        """A part's rows; raises DamagedError where the file is not the committed one.

        The text columns in `encoded` come dictionary-encoded, which is quick where values repeat.
        """
        with open_table(self.files, record, encoded) as opened:
            return _read(opened, record, columns)

    def read_rows(
        self, record: PartRecord, first: int, rows: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows [first, first + rows) of a part. Decodes their row groups, in the calling thread."""
        with open_table(self.files, record, sparse=rows < record.rows) as opened:
            sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            low = int(np.searchsorted(starts, first, side="right")) - 1
            high = int(np.searchsorted(starts, first + rows, side="left"))
            return _read(opened, record, columns, range(low, high)).slice(first - int(starts[low]), rows)

    def read_rejects(self, record: PartRecord) -> pa.Table:
        """The rejected rows of a part, with reasons."""
        if record.rejects_file is None:
            return REJECTS.empty_table()
        with _open(self.files, record.rejects_file, record) as opened:
            return _read(opened, record, None)

    def scan(self, records: Iterable[PartRecord]) -> "pl.LazyFrame":
        """The rows of many parts as one polars LazyFrame.

        It has the columns of the first part; null where another part, of an earlier version, lacks one.
        """
        import polars as pl

        tables = _tables(records)
        paths = [self.files.path(entry.key) for entry in tables]
        if None not in paths:
            names = [str(path) for path in paths]
            return pl.scan_parquet(names, missing_columns="insert", extra_columns="ignore", glob=False)
        return pl.scan_pyarrow_dataset(self._dataset(tables))

    def dataset(self, records: Iterable[PartRecord]) -> "ds.Dataset":
        """The rows of many parts as one pyarrow Dataset."""
        return self._dataset(_tables(records))

    def fetch_folder(self, record: PartRecord) -> Path:
        """A local folder with the files of a folder part. Do not change its contents.

        In a local store it is the stored folder; otherwise a verified copy in the user's cache.
        """
        if record.table is not None or not record.payload:
            raise StoreError(f"{record.key} is a table, not a folder. Use read_part.")
        first = record.payload[0]
        root = self.files.path(first.key.removesuffix(f"/{first.name}"))
        if root is not None:
            for entry in record.payload:
                _check_size(record, entry, self.files.size(entry.key))
            return root
        target = cache_folder() / "folders" / record.digest
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as unfinished:
            copy = Path(unfinished, "files")
            for entry in record.payload:
                path = copy / entry.name
                path.parent.mkdir(parents=True, exist_ok=True)
                _download(self.files, entry, path, record)
            try:
                os.rename(copy, target)
            except OSError:  # another process fetched it in the meantime
                if not target.is_dir():
                    raise
        return target

    def _dataset(self, tables: list[FileEntry]) -> "ds.Dataset":
        import pyarrow.dataset as ds

        if isinstance(self.files, RemoteFiles):
            names = [f"{self.files.root}/{entry.key}" for entry in tables]
            return ds.dataset(names, format="parquet", filesystem=self.files.filesystem)
        return ds.dataset([str(self.files.path(entry.key)) for entry in tables], format="parquet")


def open_table(
    files: Files, record: PartRecord, encoded: Sequence[str] = (), *, sparse: bool = False
) -> pq.ParquetFile:
    """A part's Parquet file, its size and row count checked. Close it, or use it in a `with`.

    The text columns in `encoded` come dictionary-encoded. With `sparse`, an object store is asked only
    for the ranges that are read.
    """
    entry = record.table
    if entry is None:
        raise StoreError(f"{record.key} is a folder, not a table. Use fetch_folder.")
    opened = _open(files, entry, record, encoded, sparse)
    if (rows := opened.metadata.num_rows) != record.rows:
        raise DamagedError(
            f"{record.key}: {entry.key} has {rows} rows, {record.rows} were committed. {_REMEDY}"
        )
    return opened


def cache_folder() -> Path:
    """The user's cache folder for copies from stores that are not local."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qrpo"


def _tables(records: Iterable[PartRecord]) -> list[FileEntry]:
    tables = [record.table for record in records if record.table]
    if not tables:
        raise StoreError("there are no parts to scan: the list is empty.")
    return tables


def _check_size(record: PartRecord, entry: FileEntry, size: int | None) -> None:
    if size is None:
        raise DamagedError(f"{record.key}: {entry.key} is missing. {_REMEDY}")
    if size != entry.bytes:
        raise DamagedError(
            f"{record.key}: {entry.key} has {size} bytes, {entry.bytes} were committed. {_REMEDY}"
        )


def _download(files: Files, entry: FileEntry, path: Path, record: PartRecord) -> None:
    try:
        with files.open_input(entry.key, entry.bytes) as source, open(path, "wb") as file:
            shutil.copyfileobj(source, file, 4 << 20)
    except FileNotFoundError:
        raise DamagedError(f"{record.key}: {entry.key} is missing. {_REMEDY}") from None
    if (digest := file_digest(path)) != entry.sha256:
        raise DamagedError(
            f"{record.key}: {entry.key} has the sha256 {digest}, expected {entry.sha256}. {_REMEDY}"
        )


def _open(
    files: Files, entry: FileEntry, record: PartRecord, encoded: Sequence[str] = (), sparse: bool = False
) -> pq.ParquetFile:
    size: int | None = None
    try:
        file: Any = files.path(entry.key)
        if file is not None:
            size = file.stat().st_size
        else:
            if sparse and entry.bytes > _SMALL and isinstance(files, RemoteFiles):
                file = files.open_ranges(entry.key, entry.bytes)
            else:
                file = files.open_input(entry.key, entry.bytes)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        pass
    _check_size(record, entry, size)
    try:
        # fetching ahead saves requests; from a local file it would only be another copy
        return pq.ParquetFile(file, pre_buffer=not isinstance(file, Path), read_dictionary=list(encoded))
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedError(
            f"{record.key}: {entry.key} is not readable as Parquet ({error}). {_REMEDY}"
        ) from None


def _read(
    opened: pq.ParquetFile,
    record: PartRecord,
    columns: Sequence[str] | None,
    groups: Sequence[int] | None = None,
) -> pa.Table:
    names = opened.schema_arrow.names
    if unknown := sorted(set(columns or ()) - set(names)):
        raise StoreError(f"{record.key} has no column {', '.join(unknown)}; it has {', '.join(names)}.")
    columns = columns if columns is None else list(columns)
    try:
        if groups is None:
            return opened.read(columns=columns)
        return opened.read_row_groups(groups, columns=columns, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedError(f"{record.key}: its rows cannot be decoded ({error}). {_REMEDY}") from None
