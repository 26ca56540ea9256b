"""`qrpo compare`: methods, grids and seeds from one set of samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import storage
from qrpo.evaluation import prompt_scores
from qrpo.selection import selection_half
from storage import Store
from tasks.comparison import candidates
from tasks.config import load_config

METHODS = {
    "qrpo": {"policy.loss": "qrpo", "policy.beta": [0.05, 0.5]},
    "dpo": {"policy.loss": "dpo", "policy.beta": 0.1},
    "few": {"quantiles.num_ref": 1},
}


@pytest.fixture
def config(write_task: Callable[..., Path], tmp_path: Path) -> Path:
    changes: dict[str, Any] = {
        "prompts__eval_fraction": 0.3,
        "quantiles__num_completions": 2,
        "quantiles__num_ref": 2,
        "policy__epochs": 1,
        "evaluation__num_samples": 2,
        "run__cpu_threads": 1,
        "compare__seeds": [0, 1],
        "compare__methods": METHODS,
    }
    return write_task(tmp_path / "task", **changes)


def test_candidates_are_every_method_point_and_seed_as_runs_of_their_own(config: Path) -> None:
    every = list(candidates(load_config(config)))
    assert [(one.method, one.settings.get("policy.beta"), one.seed) for one in every] == [
        ("dpo", 0.1, 0),
        ("dpo", 0.1, 1),
        ("few", None, 0),
        ("few", None, 1),
        ("qrpo", 0.05, 0),
        ("qrpo", 0.05, 1),
        ("qrpo", 0.5, 0),
        ("qrpo", 0.5, 1),
    ]
    assert every[6].config.name == "tiny.qrpo-2.seed-0"
    assert every[6].config.policy.beta == 0.5
    assert every[7].config.policy.seed == 1
    assert every[3].config.quantiles.num_ref == 1
    assert len({one.config.name for one in every}) == len(every)


def test_an_unknown_setting_of_a_method_is_named(
    config: Path, tmp_path: Path, qrpo: Callable[..., Any]
) -> None:
    result = qrpo(
        "compare", config, "--store", tmp_path / "store", "--set", "compare.methods={dpo: {policy.beat: 1}}"
    )
    assert result.exit_code == 2
    assert "compare.methods.dpo" in result.stderr
    assert "policy.beat: unknown key" in result.stderr


def test_a_comparison_without_methods_says_what_to_write(
    write_task: Callable[..., Path], tmp_path: Path, qrpo: Callable[..., Any]
) -> None:
    result = qrpo("compare", write_task(tmp_path / "task"), "--store", tmp_path / "store")
    assert result.exit_code == 2
    assert "compare.methods is empty" in result.stderr


@pytest.mark.slow
def test_methods_share_their_samples_and_are_judged_on_the_same_half(
    config: Path, tmp_path: Path, qrpo: Callable[..., Any]
) -> None:
    arguments = ("compare", config, "--store", tmp_path / "store", "--json")
    result = qrpo(*arguments, "--out", tmp_path / "report.json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert list(report["methods"]) == ["dpo", "few", "qrpo"]
    assert len(report["methods"]["qrpo"]["tried"]) == 2

    store = Store(tmp_path / "store")
    runs = store.runs()
    assert len(runs) == 8
    for stage in ("completions", "rewards"):
        assert len({store.run(name)["stages"][stage]["fingerprint"] for name in runs}) == 1  # type: ignore[index]
    policies = {store.run(name)["stages"]["policy"]["fingerprint"] for name in runs}  # type: ignore[index]
    assert len(policies) == 8
    few = storage.open(store, "tiny.few-1.seed-0", "shards").lazy.collect()
    assert set(few["num_ref"]) == {1}

    # by hand: dpo's two seeds, on the half that reports
    rewards = []
    for seed in (0, 1):
        table = storage.open(store, f"tiny.dpo-1.seed-{seed}", "evaluation").dataset.to_table()
        prompt_ids, scores = prompt_scores(table, "reward")
        rewards.append(scores["policy"][~selection_half(prompt_ids)].mean())
    assert report["methods"]["dpo"]["scores"]["reward"]["mean"] == pytest.approx(sum(rewards) / 2)

    again = json.loads(qrpo(*arguments).stdout.splitlines()[-1])
    assert again == report
