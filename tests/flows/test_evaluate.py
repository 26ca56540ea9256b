"""`qrpo evaluate`: more models beside the run's own, runs that are seeds of one, and a suite, as a user types it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from flows.cli import app
from qrpo.statistics import seeds_and_prompts

pytestmark = pytest.mark.slow


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path], prefect_server: str
) -> Path:
    """A folder with a store of two runs that differ in their training seed."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = write_task(folder / "task", prompts=40, prompts__eval_fraction=0.4, evaluation__num_samples=2)
    for seed in (0, 1):
        done = command(
            "run",
            config,
            "--store",
            folder / "store",
            "--set",
            f"policy.seed={seed}",
            "--set",
            f"name=seed-{seed}",
        )
        assert done.exit_code == 0, done.stderr
    return folder


def evaluation(runs: Path, name: str) -> tuple[set[str], pl.DataFrame]:
    """The files and the rows of a run's evaluation."""
    shown = command("show", name, "evaluation", "--store", runs / "store", "--json")
    assert shown.exit_code == 0, shown.stderr
    parts = json.loads(shown.stdout)["parts"]
    return set(parts), pl.read_parquet(parts)


def test_reference_is_sampled_once_for_all_policies_that_it_is_compared_with(runs: Path) -> None:
    first, second = evaluation(runs, "seed-0"), evaluation(runs, "seed-1")

    shared = pl.read_parquet(sorted(first[0] & second[0]))
    assert set(shared["model"]) == {"reference"}
    assert len(shared) == len(first[1].filter(pl.col("model") == "reference"))
    assert set(pl.read_parquet(sorted(first[0] - second[0]))["model"]) == {"policy"}


def test_seeds_are_taken_as_one_with_an_interval_over_seeds_and_prompts(runs: Path) -> None:
    done = command("evaluate", "seed-0", "seed-1", "--store", runs / "store", "--json")

    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["runs"]) == {"seed-0", "seed-1"}
    means = [
        evaluation(runs, name)[1]
        .filter(pl.col("model") == "policy")
        .group_by("prompt_id")
        .agg(pl.col("reward").cast(pl.Float64).mean())
        .sort("prompt_id")["reward"]
        .to_list()
        for name in ("seed-0", "seed-1")
    ]
    together = answer["together"]
    expected = seeds_and_prompts(pl.DataFrame(means).to_numpy().T)
    assert {key: together["reward"][key] for key in expected} == pytest.approx(expected)
    assert together["prompts"] == len(means[0])
    assert together["win_rate"]["low"] <= together["win_rate"]["mean"] <= together["win_rate"]["high"]


def test_another_model_is_compared_by_name_and_only_its_own_samples_are_drawn(
    runs: Path, base_model: Path
) -> None:
    before, _ = evaluation(runs, "seed-0")

    done = command("evaluate", "seed-0", "--model", f"same={base_model}", "--store", runs / "store", "--json")

    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)["runs"]["seed-0"]
    after, rows = evaluation(runs, "seed-0")
    assert before < after
    assert set(pl.read_parquet(sorted(after - before))["model"]) == {"same"}
    # the same weights as the reference: no divergence, whatever was said
    assert summary["others"]["same"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert set(summary["best"]["selected_by"]) == {"policy", "same"}
    texts = {name: rows.filter(pl.col("model") == name)["text"].to_list() for name in ("same", "reference")}
    assert texts["same"] != texts["reference"], "both drew with the same seeds"

    for_people = command("evaluate", "seed-0", "--store", runs / "store")
    assert for_people.exit_code == 0, for_people.stderr
    for measure in ("win rate at equal length", "distinct token pairs", "best by reward"):
        assert measure in for_people.stdout


def test_report_of_a_real_run_is_written(runs: Path, tmp_path: Path) -> None:
    done = command("report", "seed-1", "--store", runs / "store", "--out", tmp_path / "page.html")

    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 10
    assert "From outside: data, models, rewards" in page


@pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="the sandbox needs bubblewrap: `make system` installs it"
)
def test_suite_answers_are_drawn_once_and_its_files_are_kept(runs: Path, tmp_path: Path) -> None:
    problem = {
        "task_id": "one",
        "query": "say 1",
        "prompt": "",
        "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    hard = {**problem, "task_id": "long", "query": "word " * 500}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps(hard) + "\n")
    asked = [
        *("evaluate", "seed-0", "--suite", "leetcode", "--data", tmp_path / "problems.jsonl", "--samples", 2),
        *("--out", tmp_path / "out", "--store", runs / "store", "--json"),
    ]

    done = command(*asked)

    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["pass_at_1"]["mean"] == 0, "a model of random weights wrote a program"
    assert (result["problems"], result["samples"]) == (1, 2)
    assert "exceed the engine's context" in result["refused"]["long"]
    solutions = [json.loads(line) for line in (tmp_path / "out" / "solutions.jsonl").read_text().splitlines()]
    kept = json.loads((tmp_path / "out" / "completions.json").read_text())
    assert [row["text"] for row in solutions] == kept["texts"]["one"]
    before = (tmp_path / "out" / "completions.json").stat().st_mtime_ns
    assert json.loads(command(*asked).stdout) == result
    assert (tmp_path / "out" / "completions.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "no run named 'nobody'"),
        (["seed-0", "--model", "x"], "expected NAME=PATH"),
        (["seed-0", "--model", "policy=x"], "cannot name a model"),
        (["seed-0", "--suite", "leetcode"], "with --data"),
        (["seed-0", "--suite", "chess", "--data", "x"], "no suite 'chess'"),
        (["seed-0", "--suite", "alpaca-eval", "--data", "x", "--which", "y"], "no model 'y'"),
        (["seed-0", "--suite", "alpaca-eval", "--data", "x", "--judge", "adress=1"], "its settings are"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(runs: Path, arguments: list[str], message: str) -> None:
    done = command("evaluate", *arguments, "--store", runs / "store")

    assert done.exit_code == 2, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
