"""Rows of files and datasets, each with its location. An unreadable row is a DataError in its
place.

Supported are JSONL, JSON, CSV and Parquet, compressed or not, at a path, a glob or any fsspec URL,
and Hugging Face datasets as `hf://org/name[/config][@revision][:split]` (also a folder:
`hf:///path/to/folder:train`). Files are streamed, except `.json`. Errors of a whole file are
raised: missing, not Parquet, a quote in a CSV file that is never closed, UTF-16, two columns of one
name.
"""

import codecs
import csv
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from qrpo.errors import DataError

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
_HARMLESS = {"", "download", "raw", "dl", "inline", "ref", "versionId"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def is_dataset(source: str) -> bool:
    """Whether the source is a Hugging Face dataset, not files that can be read and hashed."""
    return source.startswith("hf://") and _format(source) is None


def has_credentials(source: str) -> bool:
    """Whether a URL holds more than host, port, path and harmless query keys: a password, a
    signature."""
    for url in source.split("::"):
        scheme, found, rest = url.partition("://")
        if not found or scheme in ("hf", "github", "file", "local", "memory"):
            continue
        host, _, path = rest.partition("?")[0].partition("/")
        user, at, host = host.rpartition("@")
        port = host.partition(":")[2]
        query = {item.partition("=")[0] for item in rest.partition("?")[2].split("&")} - _HARMLESS
        password = ":" in user or (at and scheme.startswith("http")) or (port and "@" in path)
        if password or (port and not port.isdigit()) or (query and "?" in rest):
            return True
    return False


def source_files(source: str) -> list[str]:
    """The URLs of the source's files, sorted; DataError if there are none."""
    try:
        fs, path = fsspec.url_to_fs(source)
        found = [path] if fs.isfile(path) else []
        for pattern in (path.replace("[", "[[]"), path):  # brackets in a folder's name, or a set
            found = found or (sorted(fs.glob(pattern)) if any(mark in path for mark in "*?[") else [])
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
    name = _uncompressed(url)
    return next((kind for ending, kind in _FORMATS.items() if name.endswith(ending)), None)


def _uncompressed(url: str) -> str:
    name = url.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return name


def _as_row(value: Any, where: str) -> Row | DataError:
    if isinstance(value, dict):
        return value
    if isinstance(value, DataError):
        return DataError(f"{where}: {value}")
    return DataError(f"{where}: got a JSON {type(value).__name__}, expected an object with named columns")


def _jsonl_rows(url: str) -> Iterator[tuple[str, Row | DataError]]:
    with fsspec.open(url, "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _refuse_utf16(line, url)
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                where = f"{url}:{number}"
                yield where, _parsed(line, where)


def _refuse_utf16(start: bytes, url: str) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start[:4]:
        raise DataError(f"{url} is UTF-16 (or UTF-32) text, expected UTF-8: save it as UTF-8")


def _parsed(line: bytes, where: str) -> Row | DataError:
    try:
        return _as_row(_loads(line), where)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not valid JSON: {error}")


def _loads(text: bytes) -> Any:
    """The JSON value, with a DataError in place of an object (and those around it) that has a key
    twice."""
    found: list[DataError] = []

    def build(pairs: list[tuple[str, Any]]) -> Row | DataError:
        row = dict(pairs)
        if len(row) < len(pairs):
            found.append(_repeated([name for name, _ in pairs]))
            return found[-1]
        inner = [value for value in row.values() if found and isinstance(value, (list, DataError))]
        return next((error for value in inner for error in found if _holds(value, error)), row)

    return json.loads(text, object_pairs_hook=build)


def _holds(value: Any, error: DataError) -> bool:
    return any(_holds(item, error) for item in value) if isinstance(value, list) else value is error


def _repeated(names: Sequence[str]) -> DataError:
    repeated = sorted({name for name in names if names.count(name) > 1})
    return DataError(f"{', '.join(map(repr, repeated))} is there more than once: rename all but one")


def _json_rows(url: str) -> Iterator[tuple[str, Row | DataError]]:
    with fsspec.open(url, "rb", compression="infer") as file:
        text = file.read()
    try:
        value = _loads(text)
    except (ValueError, RecursionError) as error:
        first = next((line for line in text.splitlines() if line.strip()), b"")
        if isinstance(_parsed(first, url), DataError):
            raise DataError(f"{url} is not valid JSON: {error}") from error
        yield from _jsonl_rows(url)  # JSON lines in a file named .json
        return
    if isinstance(value, DataError):
        raise DataError(f"{url}: {value}")
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
        last = ""

        def lines() -> Iterator[str]:
            nonlocal last
            for last in file:  # noqa: UP028 (the row's last line, for its error)
                yield last

        reader = csv.reader(
            lines(), delimiter="\t" if _uncompressed(url).endswith(".tsv") else ",", strict=True
        )
        header: list[str] | None = None
        while True:
            before = reader.line_num
            where = f"{url}:{before + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if reader.line_num == before + 1 and last.count('"') % 2 == 0:  # no quote is left open
                    yield where, DataError(f"{where}: not valid CSV: {error}")
                    continue
                raise DataError(
                    f"{where}: a quote that opens here is not closed as it should be ({error}, line {reader.line_num}), "
                    "so the rows after it cannot be separated: fix the line, writing a quote inside a field twice"
                ) from error
            if not fields:
                continue
            if header is None:
                if "\0" in "".join(fields) or "".join(fields[:1]).startswith(
                    ("\udcff\udcfe", "\udcfe\udcff")
                ):
                    raise DataError(f"{url} is UTF-16 text, expected UTF-8: save it as UTF-8")
                if len(set(fields)) < len(fields):
                    raise DataError(f"{where}: the column {_repeated(fields)}")
                header = fields
            elif len(fields) != len(header):
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
            names = parquet.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{url}: the column {_repeated(names)}")
            stated = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
            labels = _label_names(json.loads(stated).get("info", {}).get("features", {}))
            number = 0
            for batch in parquet.iter_batches(batch_size=1024):
                for row in _python_rows(batch):
                    where = f"{url}[{number}]"
                    yield where, _labelled(row, labels, where)
                    number += 1
        except pa.ArrowInvalid as error:
            raise DataError(f"{url} is not a readable Parquet file: {error}") from error


def _python_rows(batch: Any) -> Iterator[Row | DataError]:
    """The rows of an Arrow batch; a DataError for one with a value that Python has no type for."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for row in range(batch.num_rows):
            try:
                yield {name: batch.column(name)[row].as_py() for name in batch.schema.names}
            except (ValueError, OverflowError) as error:
                yield DataError(f"a value that Python cannot hold: {error}")


def _dataset_rows(source: str) -> Iterator[tuple[str, Row | DataError]]:
    import datasets

    name, configuration, revision, split = dataset_names(source)
    try:
        with tempfile.TemporaryDirectory() as unshared:
            # the library's own cache goes by the files' times, and would return the rows of older
            # files
            cache = unshared if Path(name).is_dir() else None
            if _is_saved(Path(name)):
                rows = datasets.load_from_disk(name)
                splits = list(rows) if isinstance(rows, dict) else [str(rows.split or split)]
                if split not in splits:
                    raise ValueError(f"it has no split {split!r}, only {', '.join(map(repr, splits))}")
                rows = rows[split] if isinstance(rows, dict) else rows
            else:
                rows = datasets.load_dataset(
                    name, configuration, split=split, revision=revision, cache_dir=cache
                )
            labels = _label_names(rows.features.to_dict())
            for number, row in enumerate(_dataset_items(rows)):
                where = f"{source}[{number}]"
                yield where, _labelled(row, labels, where)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"cannot load {source}: {reason}. Remedy: check name, configuration, split and the network"
        ) from error


def _label_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """The columns of labels that a dataset stores as numbers, with the labels' names."""
    stored = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    return {name: kind["names"] for name, kind in stored.items() if kind.get("_type") == "ClassLabel"}


def _labelled(row: Row | DataError, labels: dict[str, list[str]], where: str) -> Row | DataError:
    """The row with names in place of labels' numbers; null for the number of no label."""
    if isinstance(row, DataError):
        return DataError(f"{where}: {row}")
    for name, names in labels.items():
        value = row.get(name)
        row[name] = names[value] if isinstance(value, int) and 0 <= value < len(names) else None
    return row


def _dataset_items(rows: Any) -> Iterator[Row | DataError]:
    number = 0
    while number < len(rows):
        try:
            for row in rows.skip(number):
                yield dict(row)
                number += 1
        except (ValueError, OverflowError) as error:
            yield DataError(f"a value that Python cannot hold: {error}")
            number += 1


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def dataset_names(source: str) -> tuple[str, str | None, str | None, str]:
    """(folder or hub id, configuration, revision, split) of a Hugging Face dataset."""
    match = _DATASET.fullmatch(source)
    if match is None:
        raise DataError(f"got {source!r}, expected hf://org/name[/config][@revision][:split]")
    name, configuration = str(Path(match["name"]).expanduser()), None
    in_folder = match["name"].startswith(("/", ".", "~")) and Path(name).parent.is_dir()
    if not Path(name).is_dir() and (in_folder or match["name"].count("/") == 2):
        name, _, configuration = name.rpartition("/")
    return name, configuration, match["revision"], match["split"] or "train"


_READERS = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}
