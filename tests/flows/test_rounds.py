"""Rounds: the policy's own samples, scored against the reference rewards of the first round."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

import storage
from storage import Store
from tests.support.flows import run_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(trained: Path, copy_of: Callable[[Path], Path]) -> tuple[Store, dict[str, Any], Path]:
    config, store = trained / "two-rounds.yaml", copy_of(trained)
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    config.write_text(yaml.safe_dump(settings | {"rounds": {"count": 2, "num_completions": 3}}))
    return Store(store), run_json("run", config, "--store", store), config


def rows(store: Store, run: str, stage: str) -> pl.DataFrame:
    return storage.open(store, run, stage).lazy.collect()


def test_each_round_is_a_run_of_its_own_with_an_evaluation(
    finished: tuple[Store, dict[str, Any], Path],
) -> None:
    store, summary, _ = finished
    assert [one["run"] for one in summary["rounds"]] == ["tiny", "tiny.round-2"]
    assert all("win_rate" in one["evaluation"] for one in summary["rounds"])
    assert sorted(store.runs()) == ["tiny", "tiny.round-2"]


def test_the_second_round_keeps_the_first_ones_reference_samples_and_their_rewards(
    finished: tuple[Store, dict[str, Any], Path],
) -> None:
    store, summary, _ = finished
    second = summary["rounds"][1]["stages"]
    first_parts = {part.fingerprint for part in storage.open(store, "tiny", "rewards").manifest.parts}
    second_parts = {
        part.fingerprint for part in storage.open(store, "tiny.round-2", "rewards").manifest.parts
    }
    assert first_parts < second_parts
    assert second["rewards"]["parts_cached"] == len(first_parts)
    key = ["prompt_id", "ref_rewards"]
    before, after = rows(store, "tiny", "quantiles"), rows(store, "tiny.round-2", "quantiles")
    assert before.select(key).sort("prompt_id").equals(after.select(key).sort("prompt_id"))


def test_the_second_round_trains_on_the_first_policys_samples_alone(
    finished: tuple[Store, dict[str, Any], Path],
) -> None:
    store, _, _ = finished
    completions = rows(store, "tiny.round-2", "completions")
    by_policy = completions.filter(pl.col("origin") == "policy")
    shards = rows(store, "tiny.round-2", "shards")
    assert set(shards["origin"].explode()) == {"policy"}
    assert shards["origin"].list.len().to_list() == [3] * len(shards)
    assert len(by_policy) == 3 * len(shards)
    # quantiles are shares of all the reference's rewards: no sample of the policy is one of them
    assert set(shards["num_ref"]) == {4}
    quantiles = rows(store, "tiny.round-2", "quantiles").filter(pl.col("origin").list.len() > 0)
    for row in quantiles.to_dicts():
        for reward, quantile in zip(row["reward"], row["quantile_reward"], strict=True):
            expected = sum(one <= reward for one in row["ref_rewards"]) / len(row["ref_rewards"])
            assert quantile == pytest.approx(expected)


def test_the_second_round_goes_on_from_the_first_policy_and_is_judged_by_the_reference(
    finished: tuple[Store, dict[str, Any], Path],
) -> None:
    store, _, _ = finished
    manifest = storage.open(store, "tiny.round-2", "policy").manifest
    before = storage.open(store, "tiny", "policy").manifest.parts[0]
    assert before.fingerprint in manifest.parts[0].parents
    metrics = pl.read_parquet(storage.open(store, "tiny.round-2", "policy").folder / "metrics.parquet")
    away = metrics["initial_log_ratio/mean_abs"].drop_nulls()
    assert away[0] > 1e-3  # the reference's log-probabilities, not those of the policy it starts from


def test_the_second_time_all_rounds_are_cached(
    finished: tuple[Store, dict[str, Any], Path],
) -> None:
    store, summary, config = finished
    again = run_json("run", config, "--store", store.url)
    computed = [stage["parts_computed"] for one in again["rounds"] for stage in one["stages"].values()]
    assert set(computed) == {0}
    assert again["evaluation"] == summary["evaluation"]


def test_a_round_without_the_run_before_it_says_so(
    write_task: Callable[..., Path], tmp_path: Path, qrpo: Callable[..., Any]
) -> None:
    config = write_task(tmp_path, rounds__from_run="nobody", quantiles__train_on="policy")
    result = qrpo("run", config, "--store", tmp_path / "store")
    assert result.exit_code == 2
    assert "no policy of a run named 'nobody'" in result.stderr
