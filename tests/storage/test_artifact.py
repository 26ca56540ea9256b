"""An artifact in one line: for Polars, for Arrow, and for a person who starts from the example notebook."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import storage
from tasks.stages import TABLES
from tests.support.storage import commit_scores, part_key, scores

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
    rewards = scores(6)
    texts = [f"text {n}" for n in range(6)]
    said = {"finish_reason": "stop", "sampled_logprob": -1.0}
    keys = rewards.select(["prompt_id", "sample_index", "origin"]).to_pylist()
    rows = {
        "prompts": [
            {
                "prompt_id": "p",
                "messages": [{"role": "user", "content": "What?"}],
                "split": "train",
                "source": "s",
                "offline_completions": [],
                "metadata": "{}",
                "conversational": False,
            }
        ],
        "completions": [
            key | said | {"text": text, "token_ids": [1] * n}
            for n, (key, text) in enumerate(zip(keys, texts, strict=True))
        ],
        "rewards": rewards.to_pylist(),
        "quantiles": [
            {
                "prompt_id": "p",
                "ref_rewards": [0.0, 1.0],
                "num_ref": 2,
                "num_excluded": 0,
                "ref_mean": 0.5,
                "ref_std": 0.5,
            }
            | {"sample_index": [0, 1], "origin": ["reference", "reference"]}
            | {name: [0.0, 0.5] for name in ("reward", "quantile_reward", "quantile_low", "quantile_high")}
        ],
    }
    stages = {}
    for stage, values in rows.items():
        table = pa.Table.from_pylist(values, TABLES[stage].schema)
        part = store.commit_part(part_key(stage), table, table=TABLES[stage])
        manifest = storage.manifest_of(stage, "family", [part])
        stages[stage] = {"fingerprint": store.commit_manifest(manifest).fingerprint}
    store.write_run("mine", {"stages": stages})

    result = subprocess.run(
        [sys.executable, NOTEBOOK, store.url, "mine"], capture_output=True, text=True, timeout=120
    )

    assert result.returncode == 0, result.stderr
    best = max(zip(rewards["reward"].to_pylist(), texts, strict=True))[1]
    first_row = next(
        line
        for line in result.stdout.splitlines()
        if "text " in line and "┆" in line and "reward" not in line
    )
    assert best in first_row
    assert "6 rows; 0 without a reward" in result.stdout
    assert "rewards rejected: 0" in result.stdout
