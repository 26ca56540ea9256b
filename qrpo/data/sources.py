"""Rows of files and datasets, each with its location. An unreadable row is a DataError in its
place.

Supported are JSONL, JSON, CSV and Parquet, compressed or not, at a path, a glob or any fsspec URL,
and Hugging Face datasets as `hf://org/name[/config][@revision][:split]` (also a folder:
`hf:///path/to/folder:train`). Files are streamed, except `.json`. Errors of a whole file (missing,
or not a Parquet file) are raised.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from qrpo.errors import DataError

__all__ = ["is_dataset", "read_rows", "source_files"]

Row = dict[str, Any]

_DATASET = re.compile(r"hf://(?P<name>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<split>.+))?")
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def is_dataset(source: str) -> bool:
    """Whether the source is a Hugging Face dataset, not files that can be read and hashed."""
    return source.startswith("hf://") and _format(source) is None


def source_files(source: str) -> list[str]:
    """The URLs of the source's files, sorted; DataError if there are none."""
    try:
        fs, path = fsspec.url_to_fs(source)
        found = (
            sorted(fs.glob(path))
            if any(mark in path for mark in "*?[")
            else [path]
            if fs.isfile(path)
            else []
        )
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"cannot list {source}: {error}") from error
    if not found:
        raise DataError(
            f"no file {source}" + ("" if "://" in source else f" (from {Path.cwd()})") + ": fix the path"
        )
    return [str(fs.unstrip_protocol(name)) if "://" in source else name for name in found]


def read_rows(source: str) -> Iterator[tuple[str, Row | DataError]]:
    """(where, row) for every row of the source, such as ("prompts.jsonl:17", {...}).

    For a row that cannot be read, `row` is a DataError that names its location; reading continues
    after it.
    """
    if is_dataset(source):
        yield from _dataset_rows(source)
        return
    for url in source_files(source):
        kind = _format(url)
        if kind is None:
            raise DataError(
                f"{url} has no known format, expected {', '.join(sorted(_FORMATS))} (or one of them .gz)"
            )
        try:
            yield from _READERS[kind](url)
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read {url}: {error}") from error


def _format(url: str) -> str | None:
    name = url.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((kind for ending, kind in _FORMATS.items() if name.endswith(ending)), None)


def _as_row(value: Any, where: str) -> Row | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"{where}: got a JSON {type(value).__name__}, expected an object with named columns")


def _jsonl_rows(url: str) -> Iterator[tuple[str, Row | DataError]]:
    with fsspec.open(url, "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                where = f"{url}:{number}"
                yield where, _parsed(line, where)


def _parsed(line: bytes, where: str) -> Row | DataError:
    try:
        return _as_row(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not valid JSON: {error}")


def _json_rows(url: str) -> Iterator[tuple[str, Row | DataError]]:
    with fsspec.open(url, "rb", compression="infer") as file:
        text = file.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        first = next((line for line in text.splitlines() if line.strip()), b"")
        if isinstance(_parsed(first, url), DataError):
            raise DataError(f"{url} is not valid JSON: {error}") from error
        yield from _jsonl_rows(url)  # JSON lines in a file named .json
        return
    if isinstance(value, dict):
        lists = [rows for rows in value.values() if isinstance(rows, list)]
        if len(lists) != 1:
            raise DataError(f"{url}: expected a list of objects, or an object that holds one such list")
        value = lists[0]
    if not isinstance(value, list):
        raise DataError(f"{url}: got a JSON {type(value).__name__}, expected a list of objects")
    for index, row in enumerate(value):
        where = f"{url}[{index}]"
        yield where, _as_row(row, where)


def _csv_rows(url: str) -> Iterator[tuple[str, Row | DataError]]:
    csv.field_size_limit(1 << 30)
    with fsspec.open(url, "rb", compression="infer") as binary:
        # undecodable bytes become lone surrogates, which make only their own row unusable
        file = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(file, delimiter="\t" if ".tsv" in url.lower() else ",")
        header: list[str] | None = None
        while True:
            where = f"{url}:{reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, DataError(f"{where}: not valid CSV: {error}")
                continue
            if header is None:
                header = fields
            elif len(fields) != len(header):
                if fields:
                    yield (
                        where,
                        DataError(f"{where}: got {len(fields)} fields, expected the header's {len(header)}"),
                    )
            else:
                yield where, dict(zip(header, fields, strict=True))


def _parquet_rows(url: str) -> Iterator[tuple[str, Row | DataError]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        try:
            parquet = pq.ParquetFile(file)
            number = 0
            for batch in parquet.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{url}[{number}]", row
                    number += 1
        except pa.ArrowInvalid as error:
            raise DataError(f"{url} is not a readable Parquet file: {error}") from error


def _dataset_rows(source: str) -> Iterator[tuple[str, Row | DataError]]:
    import datasets

    match = _DATASET.fullmatch(source)
    if match is None:
        raise DataError(f"got {source!r}, expected hf://org/name[/config][@revision][:split]")
    name, revision, split = match["name"], match["revision"], match["split"] or "train"
    configuration = None
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            rows = saved[split] if isinstance(saved, dict) else saved
        else:
            if not folder.is_dir() and name.count("/") == 2:
                name, _, configuration = name.rpartition("/")
            rows = datasets.load_dataset(name, configuration, split=split, revision=revision)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot load {source}: {first}. Remedy: check name, configuration, split and the network"
        ) from error
    for number, row in enumerate(rows):
        yield f"{source}[{number}]", dict(row)


_READERS = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}
