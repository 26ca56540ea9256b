"""Reads committed parts. The bytes are checked first (`storage.contents`), so no reader gets
altered rows.

Views that read single columns of large files check Parquet's page checksums instead.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.contents import again, check_files, check_size, damaged, fetch, open_checked
from storage.errors import DamagedError, StoreError
from storage.files import LocalFiles
from storage.parts import FileEntry, PartRecord
from storage.processes import cache_folder, temporary_name
from storage.remote import Files, RemoteFiles
from storage.table import REJECTS

if TYPE_CHECKING:
    import polars as pl
    import pyarrow.dataset as ds

T = TypeVar("T")

_SMALL = 1 << 20  # bytes: a smaller file is checked as a whole, also where few of its bytes are needed


class PartReader:
    """Reads parts. `Store` inherits these methods. Each raises DamagedError for a file that is not
    the committed one."""

    files: Files

    def read_part(
        self, record: PartRecord, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()
    ) -> pa.Table:
        """A part's rows.

        The text columns in `encoded` come dictionary-encoded, which is quick where values repeat.
        """
        with _open(self.files, _table(record), record, encoded) as opened:
            return opened.read(columns=_known(opened, record, columns))

    def read_rows(
        self, record: PartRecord, first: int, rows: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows [first, first + rows) of a part. Decodes their row groups, in the calling thread."""

        def read(opened: pq.ParquetFile) -> pa.Table:
            sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            low = int(np.searchsorted(starts, first, side="right")) - 1
            high = int(np.searchsorted(starts, first + rows, side="left"))
            names = _known(opened, record, columns)
            table = opened.read_row_groups(range(low, high), columns=names, use_threads=False)
            return table.slice(first - int(starts[low]), rows)

        if isinstance(self.files, RemoteFiles) and rows < record.rows:
            return _read_sparse(self.files, record, read)
        with _open(self.files, _table(record), record) as opened:
            return read(opened)

    def read_groups(self, record: PartRecord, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of a part, one table per row group. Of a large file only these are read."""
        for group in range(self.footer(record).num_row_groups):

            def read(opened: pq.ParquetFile, group: int = group) -> pa.Table:
                return opened.read_row_group(group, columns=_known(opened, record, columns))

            yield _read_sparse(self.files, record, read)

    def footer(self, record: PartRecord) -> pq.FileMetaData:
        """The Parquet metadata of a part. Of a large file only this is read."""
        return _read_sparse(self.files, record, lambda opened: opened.metadata)

    def read_rejects(self, record: PartRecord) -> pa.Table:
        """The rejected rows of a part, with reasons."""
        if record.rejects_file is None:
            return REJECTS.empty_table()
        with _open(self.files, record.rejects_file, record) as opened:
            return opened.read()

    def read_file(self, record: PartRecord, name: str) -> bytes | None:
        """The bytes of one file of a folder part; None where it has no such file."""
        entry = next((entry for entry in record.payload if entry.name == name), None)
        if entry is None:
            return None
        file = open_checked(self.files, entry, record)
        return file.read_bytes() if isinstance(file, Path) else file.read()

    def check_sizes(self, records: Iterable[PartRecord]) -> None:
        """Raise DamagedError where a file or record of these parts is gone or has another size.

        Cheap: it lists folders and reads no content. What a listing lacks is looked up by its key.
        """
        known = list(records)
        folders = {
            f"{top}/{record.stage}/{record.family}" for record in known for top in ("parts", "rejects")
        }
        sizes = {info.key: info.bytes for folder in folders for info in self.files.list(folder)}
        for record in known:
            if record.key.record not in sizes and self.files.size(record.key.record) is None:
                raise DamagedError(
                    f"{record.key}: its record {record.key.record} is missing. `qrpo verify --repair` computes only "
                    "this part again."
                )
            for entry in record.files:
                if sizes.get(entry.key) != entry.bytes:
                    check_size(record, entry, self.files.size(entry.key))

    def scan(self, records: Iterable[PartRecord]) -> "pl.LazyFrame":
        """The rows of many parts as one polars LazyFrame.

        It has the columns of the first part; null where another part, of an earlier version, lacks
        one.
        """
        import polars as pl

        records = list(records)
        if not isinstance(self.files, LocalFiles):
            return pl.scan_pyarrow_dataset(self.dataset(records))
        paths = _checked_paths(self.files, _tables(records))
        return pl.scan_parquet(paths, missing_columns="insert", extra_columns="ignore", glob=False)

    def dataset(self, records: Iterable[PartRecord]) -> "ds.Dataset":
        """The rows of many parts as one pyarrow Dataset."""
        import pyarrow.dataset as ds

        tables = _tables(records)
        if isinstance(self.files, LocalFiles):
            return ds.dataset(_checked_paths(self.files, tables), format="parquet")
        names = [entry.key for entry, _ in tables]
        return ds.dataset(names, format="parquet", filesystem=_filesystem(self.files, tables))

    def fetch_folder(self, record: PartRecord) -> Path:
        """A local folder with the files of a folder part. Do not change its contents.

        In a local store it is the stored folder; otherwise a copy in the user's cache.
        """
        if record.table is not None or not record.payload:
            raise StoreError(f"{record.key} is a table, not a folder. Use read_part.")
        first = record.payload[0]
        root = self.files.path(first.key.removesuffix(f"/{first.name}"))
        if root is not None:
            check_files(self.files, [(entry, record) for entry in record.payload])
            return root
        target = cache_folder() / "folders" / record.digest
        copies = [(replace(entry, key=entry.name), record) for entry in record.payload]
        if target.is_dir():
            with suppress(DamagedError):
                check_files(LocalFiles(target), copies)
                return target
            shutil.rmtree(target)
        unfinished = target.parent / temporary_name()
        try:
            for entry in record.payload:
                path = unfinished / entry.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb+") as file:
                    fetch(self.files, entry, record, file)
            with suppress(OSError):  # another process fetched it in the meantime
                os.rename(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        check_files(LocalFiles(target), copies)
        return target


def _table(record: PartRecord) -> FileEntry:
    if record.table is None:
        raise StoreError(f"{record.key} is a folder, not a table. Use fetch_folder.")
    return record.table


def _tables(records: Iterable[PartRecord]) -> list[tuple[FileEntry, PartRecord]]:
    tables = [(record.table, record) for record in records if record.table]
    if not tables:
        raise StoreError("there are no parts to scan: the list is empty.")
    return tables


def _checked_paths(files: LocalFiles, tables: list[tuple[FileEntry, PartRecord]]) -> list[str]:
    check_files(files, tables)
    return [str(files.path(entry.key)) for entry, _ in tables]


def _filesystem(files: Files, tables: list[tuple[FileEntry, PartRecord]]) -> Any:
    """These tables as a read-only fsspec file system: a file is fetched and checked when it is
    opened."""
    from fsspec import AbstractFileSystem  # slow to import

    by_key = {entry.key: (entry, record) for entry, record in tables}

    class CheckedFiles(AbstractFileSystem):  # type: ignore[misc]
        cachable = False

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            return {"name": path, "size": by_key[path][0].bytes, "type": "file"}

        def _open(self, path: str, *_: Any, **__: Any) -> BinaryIO:
            file = open_checked(files, *by_key[path])
            return open(file, "rb") if isinstance(file, Path) else file

    return CheckedFiles()


def _open(files: Files, entry: FileEntry, record: PartRecord, encoded: Sequence[str] = ()) -> pq.ParquetFile:
    opened = pq.ParquetFile(open_checked(files, entry, record), read_dictionary=list(encoded))
    expected = record.rejects if entry == record.rejects_file else record.rows
    if (rows := opened.metadata.num_rows) != expected:
        raise damaged(record, entry, f"has {rows} rows, {expected} were committed")
    return opened


def _read_sparse(files: Files, record: PartRecord, read: Callable[[pq.ParquetFile], T]) -> T:
    """What `read` takes from a part's file. Of a large one only that is fetched, its page checksums
    checked."""
    entry = _table(record)
    if entry.bytes <= _SMALL or not record.checked:  # earlier versions wrote no page checksums
        with _open(files, entry, record) as opened:
            return read(opened)

    def attempt() -> T:
        check_size(record, entry, files.size(entry.key))
        try:
            with (
                files.open_ranges(entry.key, entry.bytes) as file,
                pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True) as opened,
            ):
                return read(opened)
        except (pa.ArrowInvalid, OSError) as error:
            raise damaged(record, entry, f"cannot be decoded ({error})") from None

    return again(files, attempt)


def _known(opened: pq.ParquetFile, record: PartRecord, columns: Sequence[str] | None) -> list[str] | None:
    names = opened.schema_arrow.names
    if unknown := sorted(set(columns or ()) - set(names)):
        raise StoreError(f"{record.key} has no column {', '.join(unknown)}; it has {', '.join(names)}.")
    return None if columns is None else list(columns)
