"""Reading what was committed, with the cheap half of verification: sizes and row counts, on every read.

The dear half (every byte's sha256) is `storage.verify`. A difference raises DamagedError with the file's name; it is
never read around.
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

__all__ = [
    "cache_folder",
    "dataset",
    "fetch_folder",
    "open_table",
    "read_rejects",
    "read_rows",
    "read_table",
    "scan",
]

_SMALL = 1 << 20  # bytes: below, one request for all is quicker than several for some
_REMEDY = "`qrpo verify --repair` computes just this part again."


def open_table(
    files: Files, record: PartRecord, encoded: Sequence[str] = (), *, sparse: bool = False
) -> pq.ParquetFile:
    """A part's Parquet file, its size and row count checked. Close it, or use it in a `with`.

    The text columns `encoded` come as dictionaries: many equal texts are then not made one by one.
    `sparse`: little of it will be read, so from an object store fetch only the ranges that hold what is asked for.
    """
    entry = record.table
    if entry is None:
        raise StoreError(f"{record.key} is a folder, not a table. Use fetch_folder.")
    opened = _open(files, entry, record, encoded, sparse)
    if opened.metadata.num_rows != record.rows:
        raise DamagedError(
            f"{record.key}: {entry.key} has {opened.metadata.num_rows} rows, {record.rows} were committed. {_REMEDY}"
        )
    return opened


def read_table(
    files: Files, record: PartRecord, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()
) -> pa.Table:
    """A part's rows, all columns or some; the text columns `encoded` as dictionaries."""
    with open_table(files, record, encoded) as opened:
        return _read(opened, record, columns)


def read_rows(
    files: Files, record: PartRecord, first: int, rows: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows [first, first + rows) of a part, by decoding just the row groups that they are in, in this thread."""
    with open_table(files, record, sparse=rows < record.rows) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        low = int(np.searchsorted(starts, first, side="right")) - 1
        high = int(np.searchsorted(starts, first + rows, side="left"))
        return _read(opened, record, columns, range(low, high)).slice(first - int(starts[low]), rows)


def read_rejects(files: Files, record: PartRecord) -> pa.Table:
    """The rows that a part left out; a table without rows where there are none."""
    if record.rejects_file is None:
        return REJECTS.empty_table()
    with _open(files, record.rejects_file, record) as opened:
        return _read(opened, record, None)


def scan(files: Files, records: Iterable[PartRecord]) -> "pl.LazyFrame":
    """The rows of many parts as one polars LazyFrame; columns and filters are pushed down into the files."""
    import polars as pl

    records = [record for record in records if record.table]
    if not records:
        raise StoreError("there are no parts to scan: the list is empty.")
    paths = [files.path(record.key.table) for record in records]
    if None not in paths:
        return pl.scan_parquet([str(path) for path in paths], missing_columns="raise", glob=False)
    return pl.scan_pyarrow_dataset(dataset(files, records))


def dataset(files: Files, records: Iterable[PartRecord]) -> "ds.Dataset":
    """The rows of many parts as one pyarrow Dataset."""
    import pyarrow.dataset as ds

    records = [record for record in records if record.table]
    if not records:
        raise StoreError("there are no parts to scan: the list is empty.")
    if isinstance(files, RemoteFiles):
        names = [f"{files.root}/{record.key.table}" for record in records]
        return ds.dataset(names, format="parquet", filesystem=files.filesystem)
    return ds.dataset([str(files.path(record.key.table)) for record in records], format="parquet")


def fetch_folder(files: Files, record: PartRecord, into: Path | None = None) -> Path:
    """A local folder with the part's files: in a local store its own, else a verified copy in the user's cache.

    Do not change what is in it. With `into`, a copy there that is the caller's.
    """
    if record.table is not None or not record.payload:
        raise StoreError(f"{record.key} is a table, not a folder. Use read_part.")
    first = record.payload[0]
    root = files.path(first.key.removesuffix(f"/{first.name}"))
    if root is not None:
        for entry in record.payload:
            if files.size(entry.key) != entry.bytes:
                raise DamagedError(f"{record.key}: {_changed(files, entry)} {_REMEDY}")
        if into is None:
            return root
    target = into or cache_folder() / "folders" / record.digest
    if into is None and target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as unfinished:
        for entry in record.payload:
            path = Path(unfinished, "files", entry.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(files, entry, path, record)
        if into is not None:
            shutil.copytree(Path(unfinished, "files"), into, dirs_exist_ok=True)
        else:
            try:
                os.rename(Path(unfinished, "files"), target)
            except OSError:  # another process fetched it meanwhile
                if not target.is_dir():
                    raise
    return target


def cache_folder() -> Path:
    """The user's cache folder for copies from stores that are not local."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qrpo"


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
    try:
        file: Any = files.path(entry.key)
        if file is None and sparse and entry.bytes > _SMALL and isinstance(files, RemoteFiles):
            file = files.open_ranges(entry.key, entry.bytes)
        elif file is None:
            file = files.open_input(entry.key, entry.bytes)
        size = file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise DamagedError(f"{record.key}: {entry.key} is missing. {_REMEDY}") from None
    if size != entry.bytes:
        raise DamagedError(
            f"{record.key}: {entry.key} has {size} bytes, {entry.bytes} were committed. {_REMEDY}"
        )
    try:
        # fetching ahead spares requests; from a local file it would only be another copy
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
    if columns is not None:
        unknown = sorted(set(columns) - set(opened.schema_arrow.names))
        if unknown:
            raise StoreError(
                f"{record.key} has no column {', '.join(unknown)}; it has {', '.join(opened.schema_arrow.names)}."
            )
        columns = list(columns)
    try:
        if groups is None:
            return opened.read(columns=columns)
        return opened.read_row_groups(groups, columns=columns, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedError(f"{record.key}: its rows cannot be decoded ({error}). {_REMEDY}") from None


def _changed(files: Files, entry: FileEntry) -> str:
    size = files.size(entry.key)
    if size is None:
        return f"{entry.key} is missing."
    return f"{entry.key} has {size} bytes, {entry.bytes} were committed."
