"""Rows into a Parquet, JSON-lines or CSV file, or onto the Hugging Face hub as a dataset."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from flows.views.inspect.query import Query, find_rows
from flows.views.inspect.rows import Rows
from flows.views.inspect.text import visible
from qrpo.errors import ConfigError, DataError
from storage import Manifest

__all__ = ["export_rows", "push_to_hub"]

_AT_ONCE = 65_536  # rows
_KINDS = (".parquet", ".jsonl", ".csv")


def export_rows(
    rows: Rows, query: Query, path: Path, *, columns: Sequence[str] | None, limit: int | None
) -> int:
    """Write the rows of the query into a new file, whose ending says how; the number of rows.

    In CSV, lists and structs are JSON texts. The file appears when it is whole; one that exists is not replaced.
    """
    if path.suffix not in _KINDS:
        raise ConfigError(f"--export {path}: the file's ending must be one of {', '.join(_KINDS)}")
    if path.exists():
        raise ConfigError(f"--export {path}: this file exists; remove it or name another")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--export {path}: there is no folder {path.absolute().parent}")
    names = rows.check_columns(columns) if columns else list(rows.schema)
    written = 0
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".exporting-") as folder:
        unfinished = Path(folder, path.name)
        write = {".parquet": _write_parquet, ".jsonl": _write_lines, ".csv": _write_csv}[path.suffix]
        written = write(unfinished, _frames(rows, query, names, limit))
        os.link(unfinished, path)  # refuses a file that came meanwhile
    return written


def push_to_hub(
    rows: Rows,
    manifest: Manifest,
    run: str,
    repo: str,
    query: Query,
    *,
    columns: Sequence[str] | None,
    limit: int | None,
) -> str:
    """Push the rows of the query as one Parquet file with a dataset card to a private dataset repository; its address.

    The repository is made where there is none. Who pushes is what `hf auth login` or HF_TOKEN says.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="qrpo-hub-") as folder:
        data = Path(folder, "data", "train-00000-of-00001.parquet")
        data.parent.mkdir()
        written = export_rows(rows, query, data, columns=columns, limit=limit)
        Path(folder, "README.md").write_text(_card(manifest, run, query, written), encoding="utf-8")
        try:
            made = api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                repo_type="dataset",
                folder_path=folder,
                commit_message=f"{manifest.stage} of run {run}",
            )
        except OfflineModeIsEnabled:
            raise ConfigError("--hub: HF_HUB_OFFLINE is set; unset it to push") from None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise DataError(
                f"the hub did not take {repo}: {str(error).strip().splitlines()[0]}; "
                "`hf auth login` or HF_TOKEN says who you are, and ORG/NAME must be yours to write to"
            ) from None
    return f"{api.endpoint}/datasets/{made.repo_id}"


def _frames(rows: Rows, query: Query, columns: Sequence[str], limit: int | None) -> Iterator[pl.DataFrame]:
    """The rows, some at a time: straight through where all are meant, else those that are found."""
    if query.is_plain and not query.sort and query.sample is None and limit is None:
        yield from (chunk.frame for chunk in rows.scan(columns))
        if not len(rows):
            yield rows.take([], columns)
        return
    found = find_rows(rows, query, limit=limit, seconds=float("inf"), count_seconds=0.0)
    for start in range(0, len(found.positions), _AT_ONCE):
        yield rows.take(found.positions[start : start + _AT_ONCE], columns)
    if not found.positions:
        yield rows.take([], columns)


def _write_parquet(path: Path, frames: Iterator[pl.DataFrame]) -> int:
    writer: pq.ParquetWriter | None = None
    written = 0
    try:
        for frame in frames:
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
            written += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return written


def _write_lines(path: Path, frames: Iterator[pl.DataFrame]) -> int:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for frame in frames:
            for row in frame.iter_rows(named=True):
                file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")
            written += frame.height
    return written


def _write_csv(path: Path, frames: Iterator[pl.DataFrame]) -> int:
    written = 0
    with path.open("wb") as file:
        for number, frame in enumerate(frames):
            nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
            texts = [
                pl.Series(
                    name,
                    [
                        None if v is None else json.dumps(_plain(v), ensure_ascii=False)
                        for v in frame[name].to_list()
                    ],
                    dtype=pl.String,
                )
                for name in nested
            ]
            frame.with_columns(texts).write_csv(file, include_header=number == 0)
            written += frame.height
    return written


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _card(manifest: Manifest, run: str, query: Query, rows: int) -> str:
    asked = {"where": query.where, "sort": query.sort, "sample": query.sample}
    made = (
        f"{rows:,} rows of the artifact `{manifest.stage}/{manifest.fingerprint}` ({manifest.rows:,} rows), "
        f"made {manifest.created} by qrpo-pipeline {manifest.code_version}."
    )
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files: data/*.parquet",
        "tags: [qrpo]",
        "---",
        f"# {manifest.stage} of run {run}",
        "",
        made,
        *(f"- {name}: `{visible(str(value))}`" for name, value in asked.items() if value is not None),
        "",
        "Made from:",
        *(f"- `{stage}/{fingerprint}`" for stage, fingerprint in manifest.parents.items()),
        *(
            f"- {visible(name)}: `{visible(json.dumps(value, default=str))}`"
            for name, value in manifest.inputs.items()
        ),
    ]
    return "\n".join(lines) + "\n"
