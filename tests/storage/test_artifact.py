"""An artifact in one line: for Polars, for Arrow, and for a person who starts from the example notebook."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import storage
from tasks.stages import TABLES

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.py"


@pytest.fixture
def opened(
    store: storage.Store, part_key: Callable[..., storage.PartKey], rewards_table: Callable[..., pa.Table]
) -> storage.Artifact:
    """Rewards of two parts, opened by the run's name."""
    rejects = storage.rejects_table([{"stage": "rewards", "key": "x", "reason": "no"}])
    parts = [
        store.commit_part(
            part_key("rewards", n), rewards_table(rows=10, seed=n), rejects=rejects if n else None
        )
        for n in range(2)
    ]
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
    assert opened.rejects["reason"].to_pylist() == ["no"]


def test_run_or_stage_that_is_not_there_is_told_with_what_is(opened: storage.Artifact) -> None:
    with pytest.raises(storage.StoreError, match="has no run 'yours'; it has mine"):
        storage.open(opened.store, "yours", "rewards")
    with pytest.raises(storage.StoreError, match="has no stage 'shards'; it has rewards"):
        storage.open(opened.store, "mine", "shards")


def test_example_notebook_runs_on_a_store(
    tmp_path: Path, part_key: Callable[..., storage.PartKey], rewards_table: Callable[..., pa.Table]
) -> None:
    store = storage.Store(tmp_path / "store")
    rewards = rewards_table(rows=6)
    keys = rewards.select(["prompt_id", "sample_index", "origin"])
    said = {
        "text": [f"text {n}" for n in range(6)],
        "token_ids": pa.array([[1] * n for n in range(6)], pa.list_(pa.int32())),
        "finish_reason": ["stop"] * 6,
        "sampled_logprob": pa.array([-1.0] * 6, pa.float32()),
    }
    completions = keys
    for name, column in said.items():
        completions = completions.append_column(
            name, pa.array(column) if isinstance(column, list) else column
        )
    message = {"role": "user", "content": "What?"}
    prompt = {
        "prompt_id": "p",
        "messages": [message],
        "split": "train",
        "source": "s",
        "offline_completions": [],
    }
    prompts = pa.Table.from_pylist(
        [prompt | {"metadata": "{}", "conversational": False}], TABLES["prompts"].schema
    )
    ranks = {name: [0.0, 0.5] for name in ("reward", "quantile_reward", "quantile_low", "quantile_high")}
    judged = {"prompt_id": "p", "ref_rewards": [0.0, 1.0], "num_ref": 2, "ref_mean": 0.5, "ref_std": 0.5}
    row = judged | ranks | {"sample_index": [0, 1], "origin": ["reference", "reference"]}
    quantiles = pa.Table.from_pylist([row], TABLES["quantiles"].schema)
    stages = {}
    for stage, table in {
        "prompts": prompts,
        "completions": completions,
        "rewards": rewards,
        "quantiles": quantiles,
    }.items():
        manifest = storage.manifest_of(stage, "family", [store.commit_part(part_key(stage), table)])
        stages[stage] = {"fingerprint": store.commit_manifest(manifest).fingerprint}
    store.write_run("mine", {"stages": stages})

    result = subprocess.run(
        [sys.executable, NOTEBOOK, store.url, "mine"], capture_output=True, text=True, timeout=120
    )

    assert result.returncode == 0, result.stderr
    best = max(zip(rewards["reward"].to_pylist(), said["text"], strict=True))[1]
    first_row = next(
        line
        for line in result.stdout.splitlines()
        if "text " in line and "┆" in line and "reward" not in line
    )
    assert best in first_row
    assert "6 rows; 0 without a reward" in result.stdout
    assert "rewards rejected: 0" in result.stdout
