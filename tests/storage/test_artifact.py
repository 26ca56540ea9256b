"""An artifact in one line: for Polars, for Arrow, and for a person who starts from the example notebook."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow.dataset as ds
import pytest

import storage
from tests.support.storage import commit_scores
from tests.support.views import write_artifacts

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.py"


@pytest.fixture
def opened(store: storage.Store) -> storage.Artifact:
    """Rewards of two parts, opened by the run's name."""
    parts = commit_scores(store, 2)
    manifest = store.commit_manifest(storage.manifest_of("rewards", "family", parts))
    store.write_run("mine", {"stages": {"rewards": {"fingerprint": manifest.fingerprint}}})
    return storage.open(store, "mine", "rewards")


def test_artifact_opens_as_lazy_frame_and_dataset_with_the_same_rows(opened: storage.Artifact) -> None:
    lazy, dataset = opened.lazy, opened.dataset

    assert isinstance(lazy, pl.LazyFrame)
    assert isinstance(dataset, ds.Dataset)
    rows = lazy.collect()
    assert rows.height == dataset.count_rows() == opened.manifest.rows == 20
    assert rows["reward"].to_list() == dataset.to_table(columns=["reward"])["reward"].to_pylist()
    best = lazy.filter(pl.col("reward") > 0).select("reward").collect()
    assert best.height == dataset.count_rows(filter=ds.field("reward") > 0)
    assert opened.rejects["reason"].to_pylist() == ["NaN"]


def test_run_or_stage_that_is_not_there_is_told_with_what_is(opened: storage.Artifact) -> None:
    with pytest.raises(storage.StoreError, match="has no run 'yours'; it has mine"):
        storage.open(opened.store, "yours", "rewards")
    with pytest.raises(storage.StoreError, match="has no stage 'shards'; it has rewards"):
        storage.open(opened.store, "mine", "shards")


def test_example_notebook_runs_on_a_store(tmp_path: Path) -> None:
    store = storage.Store(tmp_path / "store")
    write_artifacts(store, "mine", prompts=4, num_ref=3)

    result = subprocess.run(
        [sys.executable, NOTEBOOK, store.url, "mine"], capture_output=True, text=True, timeout=120
    )

    assert result.returncode == 0, result.stderr
    first_row = next(line for line in result.stdout.splitlines() if "I say" in line and "┆" in line)
    assert "I say 6 (2)" in first_row  # the best
    assert "12 rows; 0 without a reward" in result.stdout
    assert "rewards rejected: 1" in result.stdout
