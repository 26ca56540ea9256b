"""`qrpo compare`: methods, grids and seeds from one set of samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import storage
from qrpo.evaluation.comparison import selection_half
from qrpo.evaluation.summary import prompt_scores
from storage import Store
from tasks.comparison import candidates
from tasks.config import load_config
from tests.support.flows import run_json

METHODS = {
    "dpo": {"policy.loss": "dpo"},
    "few": {"quantiles.num_completions": 2, "quantiles.num_ref": 1},
    "qrpo": {"policy.loss": "qrpo", "policy.beta": [0.1, 0.5]},
}


@pytest.fixture
def config(write_task: Callable[..., Path], tmp_path: Path) -> Path:
    return write_task(tmp_path / "task", compare__seeds=[0, 1], compare__methods=METHODS)


def test_candidates_are_every_method_point_and_seed_as_runs_of_their_own(config: Path) -> None:
    every = list(candidates(load_config(config)))
    assert [(one.method, one.settings.get("policy.beta"), one.seed) for one in every] == [
        ("dpo", None, 0),
        ("dpo", None, 1),
        ("few", None, 0),
        ("few", None, 1),
        ("qrpo", 0.1, 0),
        ("qrpo", 0.1, 1),
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
    trained: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copy_of(trained)
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    config = tmp_path / "config.yaml"
    # one method changes an earlier stage too; the other's first point is the policy that is there
    methods = {"dpo": METHODS["dpo"] | METHODS["few"], "qrpo": METHODS["qrpo"]}
    config.write_text(yaml.safe_dump(settings | {"compare": {"seeds": [0], "methods": methods}}))
    arguments = ("compare", config, "--store", folder)
    report = run_json(*arguments, "--out", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert list(report["methods"]) == ["dpo", "qrpo"]
    assert len(report["methods"]["qrpo"]["tried"]) == 2

    store = Store(folder)
    runs = [name for name in store.runs() if name != "tiny"]
    assert len(runs) == 3
    stages = {name: store.run(name)["stages"] for name in (*runs, "tiny")}  # type: ignore[index]
    for stage in ("completions", "rewards"):
        assert len({of[stage]["fingerprint"] for of in stages.values()}) == 1
    policies = {name: of["policy"]["fingerprint"] for name, of in stages.items()}
    assert policies["tiny.qrpo-1.seed-0"] == policies["tiny"], (
        "the policy that was there is not trained again"
    )
    assert len(set(policies.values())) == 3
    assert set(storage.open(store, "tiny.dpo-1.seed-0", "shards").lazy.collect()["num_ref"]) == {1}

    # by hand: dpo, on the half that reports
    table = storage.open(store, "tiny.dpo-1.seed-0", "evaluation").dataset.to_table()
    prompt_ids, scores = prompt_scores(table, "reward")
    reports = ~selection_half(prompt_ids)
    assert report["reference_prompts"] == report["prompts"] == reports.sum()
    assert report["reference"]["reward"] == pytest.approx(scores["reference"][reports].mean())
    expected = scores["policy"][reports].mean()
    assert report["methods"]["dpo"]["scores"]["reward"]["mean"] == pytest.approx(expected)
    assert report["methods"]["dpo"]["scores"]["reward"]["standard_error"] is None, "of a single seed"

    assert run_json(*arguments) == report
