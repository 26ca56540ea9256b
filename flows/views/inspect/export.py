"""Rows into a Parquet, JSON-lines or CSV file, or onto the Hugging Face hub as a dataset."""

import json
import os
import tempfile
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from flows.views.inspect.rows import ArtifactRows, Query, find_rows
from flows.views.text import visible
from qrpo.errors import ConfigError, DataError
from storage import Manifest

_BATCH_ROWS = 65_536
_ENDINGS = (".parquet", ".jsonl", ".csv")


def export_rows(rows: ArtifactRows, query: Query, path: Path) -> int:
    """Write the rows of the query into a new file whose ending names the format; returns the number
    of rows.

    In CSV, lists and structs are JSON texts, and a text that a spreadsheet would run as a formula
    gets an apostrophe in front. The file appears once it is complete; an existing file is not
    replaced.
    """
    if path.suffix not in _ENDINGS:
        raise ConfigError(f"--export {path}: the file's ending must be one of {', '.join(_ENDINGS)}")
    if path.exists():
        raise ConfigError(f"--export {path}: this file exists; remove it or name another")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"--export {path}: there is no folder {parent}")
    names = rows.chosen(query)
    positions = find_rows(rows, query, seconds=float("inf"), count_seconds=0.0).positions
    with tempfile.TemporaryDirectory(dir=parent, prefix=".exporting-") as folder:
        unfinished = Path(folder, path.name)
        with unfinished.open("wb") as file:
            writer: pq.ParquetWriter | None = None
            for start in range(0, max(1, len(positions)), _BATCH_ROWS):
                frame = rows.take(positions[start : start + _BATCH_ROWS], names)
                if path.suffix == ".parquet":
                    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
                    writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                    writer.write_table(table)
                elif path.suffix == ".jsonl":
                    frame.write_ndjson(file)  # NaN and infinities become null
                else:
                    nested = [_as_json(name) for name, kind in frame.schema.items() if kind.is_nested()]
                    texts = [_harmless(name) for name, kind in frame.schema.items() if kind == pl.String]
                    frame.with_columns(nested + texts).write_csv(file, include_header=start == 0)
            if writer is not None:
                writer.close()
        os.link(unfinished, path)  # fails if the file was created in the meantime
    return len(positions)


def push_to_hub(rows: ArtifactRows, manifest: Manifest, run: str, repo: str, query: Query) -> str:
    """Push the rows of the query as one Parquet file with a dataset card to a private dataset
    repository; its URL.

    Creates the repository if there is none. The account is that of `hf auth login` or HF_TOKEN.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="qrpo-hub-") as folder:
        data = Path(folder, "data", "train-00000-of-00001.parquet")
        data.parent.mkdir()
        written = export_rows(rows, query, data)
        Path(folder, "README.md").write_text(_card(manifest, run, query, written), encoding="utf-8")
        try:
            created = api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
            api.upload_folder(
                repo_id=created.repo_id,
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
    return f"{api.endpoint}/datasets/{created.repo_id}"


def _harmless(name: str) -> pl.Expr:
    """A text column for a spreadsheet, which takes cells that begin so for formulas."""
    text = pl.col(name)
    return pl.when(text.str.contains(r"^[=+\-@\t\r]")).then("'" + text).otherwise(text).alias(name)


def _as_json(name: str) -> pl.Expr:
    """A nested column as JSON texts, null where it is null."""
    wrapped = pl.struct(pl.col(name).alias("v")).struct.json_encode()  # {"v":...}
    return pl.when(pl.col(name).is_not_null()).then(wrapped.str.slice(5).str.head(-1)).alias(name)


def _card(manifest: Manifest, run: str, query: Query, rows: int) -> str:
    asked = {"where": query.where, "sort": query.sort, "sample": query.sample}
    inputs = {name: json.dumps(value, default=str) for name, value in manifest.inputs.items()}
    lines = [
        "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\ntags: [qrpo]\n---",
        f"# {manifest.stage} of run {run}\n",
        (
            f"{rows:,} rows of the artifact `{manifest.stage}/{manifest.fingerprint}` ({manifest.rows:,} rows), "
            f"created {manifest.created} by qrpo-pipeline {manifest.code_version}."
        ),
        *(f"- {name}: `{visible(str(value))}`" for name, value in asked.items() if value is not None),
        "\nComputed from:",
        *(f"- `{stage}/{fingerprint}`" for stage, fingerprint in manifest.parents.items()),
        *(f"- {visible(name)}: `{visible(text)}`" for name, text in inputs.items()),
        "",
    ]
    return "\n".join(lines)
