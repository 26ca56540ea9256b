"""`qrpo evaluate`: more models beside the run's own, runs that are seeds of one, and a suite, as a user types it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from starlette.testclient import TestClient

from flows.views.browse.server import browse_app
from qrpo.evaluation.statistics import seeds_and_prompts
from storage import Store
from tasks.config import load_config
from tests.support.views import qrpo, qrpo_json, write_artifacts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, trained: Path, copy_of: Callable[[Path], Path], base_model: Path
) -> Path:
    """A folder with a store of two runs that differ in their training seed, one compared with its checkpoints and another model."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "store").symlink_to(copy_of(trained))
    other = ("--set", "policy.seed=1", "--set", "name=seed-1", "--until", "policy")
    also = ("--checkpoint", "all", "--model", f"same={base_model}")
    for arguments in (("run", trained / "config.yaml", *other), ("evaluate", "seed-1", "--trust", *also)):
        done = qrpo(*arguments, "--store", folder / "store")
        assert done.exit_code == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def evaluation(runs: Path, name: str) -> tuple[set[str], pl.DataFrame]:
    """The files and the rows of a run's evaluation."""
    parts = qrpo_json("show", name, "evaluation", "--store", runs / "store")["parts"]
    return set(parts), pl.read_parquet(parts)


def test_reference_is_sampled_once_for_all_policies_that_it_is_compared_with(runs: Path) -> None:
    first, second = evaluation(runs, "tiny"), evaluation(runs, "seed-1")

    shared = pl.read_parquet(sorted(first[0] & second[0]))
    assert set(shared["model"]) == {"reference"}
    assert len(shared) == len(first[1].filter(pl.col("model") == "reference"))
    assert set(pl.read_parquet(sorted(first[0] - second[0]))["model"]) == {"policy"}
    models = {"policy", "same", "step-1", "step-2"}
    assert set(pl.read_parquet(sorted(second[0] - first[0]))["model"]) == models


def test_seeds_are_taken_as_one_with_an_interval_over_seeds_and_prompts(runs: Path) -> None:
    answer = qrpo_json("evaluate", "tiny", "seed-1", "--store", runs / "store")

    assert set(answer["runs"]) == {"tiny", "seed-1"}
    means = [
        evaluation(runs, name)[1]
        .filter(pl.col("model") == "policy")
        .group_by("prompt_id")
        .agg(pl.col("reward").cast(pl.Float64).mean())
        .sort("prompt_id")["reward"]
        .to_list()
        for name in ("tiny", "seed-1")
    ]
    together = answer["together"]
    expected = seeds_and_prompts(pl.DataFrame(means).to_numpy().T)
    assert {key: together["reward"][key] for key in expected} == pytest.approx(expected)
    assert together["prompts"] == len(means[0])
    assert together["win_rate"]["low"] <= together["win_rate"]["mean"] <= together["win_rate"]["high"]


def test_another_model_is_compared_by_name(runs: Path) -> None:
    summary = qrpo_json("evaluate", "seed-1", "--store", runs / "store")["runs"]["seed-1"]

    # the same weights as the reference: no divergence, whatever was said
    assert summary["others"]["same"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert set(summary["best"]["selected_by"]) == {"policy", "same", "step-1", "step-2"}
    rows = evaluation(runs, "seed-1")[1]
    texts = {name: rows.filter(pl.col("model") == name)["text"].to_list() for name in ("same", "reference")}
    assert texts["same"] != texts["reference"], "both drew with the same seeds"
    said = (runs / "said.txt").read_text()
    for measure in ("win rate at equal length", "distinct token pairs", "best by reward"):
        assert measure in said


def test_checkpoints_are_compared_as_models_of_their_own_and_the_last_one_is_the_policy(runs: Path) -> None:
    rows = evaluation(runs, "seed-1")[1].sort("prompt_id", "sample_index")
    of = {str(name): group for (name,), group in rows.group_by("model")}
    # the learning rate warms up from 0: the first step changes nothing, the second does
    still, moved = (
        (of[f"step-{step}"]["model_logprob"] - of[f"step-{step}"]["ref_logprob"]).abs().max()
        for step in (1, 2)
    )
    assert still == pytest.approx(0, abs=1e-5)
    assert moved > 1e-3
    shown = qrpo_json("show", "seed-1", "policy", "--store", runs / "store")
    folder = Path(next(url for url in shown["parts"] if url.endswith("/metrics.parquet"))).parent
    steps = {
        path.name: (path / "model.safetensors").read_bytes() for path in (folder / "checkpoints").iterdir()
    }
    assert set(steps) == {"1", "2"}
    assert steps["1"] != steps["2"] == (folder / "model.safetensors").read_bytes()

    untrusted = qrpo("evaluate", "seed-1", "--samples", "3", "--store", runs / "store")
    assert untrusted.exit_code == 2
    assert "runs code (rewards.0.function" in untrusted.stderr
    missing = qrpo("evaluate", "seed-1", "--checkpoint", "7", "--store", runs / "store")
    assert missing.exit_code == 2
    assert "no checkpoint of step 7; its checkpoints: 1, 2" in missing.stderr


def test_every_token_has_its_log_probabilities_and_the_prompt_s_page_colours_it_by_their_ratio(
    runs: Path,
) -> None:
    rows = evaluation(runs, "seed-1")[1]
    for row in rows.to_dicts():
        for model in ("model", "ref"):
            tokens = row[f"{model}_token_logprobs"]
            assert len(tokens) == len(row["token_ids"])
            assert sum(tokens) == pytest.approx(row[f"{model}_logprob"], abs=1e-4)
            assert max(tokens) < 0
    (moved,) = rows.filter(pl.col("model") == "policy").head(1).to_dicts()

    client = TestClient(browse_app(Store(runs / "store")), base_url="http://localhost")
    page = client.get("/runs/seed-1").text
    order = [
        page.index(text)
        for text in ("win rate against the reference", "Training loss", "policy.beta", "Artifacts")
    ]
    assert order == sorted(order), "a run's page begins with its result"
    shown = client.get(f"/prompt/seed-1/{moved['prompt_id']}").text
    for ours, theirs in zip(moved["model_token_logprobs"], moved["ref_token_logprobs"], strict=True):
        ratio = ours - theirs
        shade = round(max(-1, min(1, ratio / 3)) * 5)
        assert f'<span class="t{shade}" title="log-ratio {ratio:.3g}">' in shown


def test_report_of_a_real_run_is_written(runs: Path, tmp_path: Path) -> None:
    done = qrpo("report", "seed-1", "--store", runs / "store", "--out", tmp_path / "page.html")

    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 10
    assert "From outside: data, models, rewards" in page


@pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="the sandbox needs bubblewrap: `make system` installs it"
)
def test_suite_answers_are_drawn_once_and_its_files_are_kept(runs: Path, tmp_path: Path) -> None:
    check = "def check(candidate):\n    assert candidate() == 1\n"
    problem = {"task_id": "one", "query": "say 1", "prompt": "", "entry_point": "f", "test": check}
    hard = {**problem, "task_id": "long", "query": "word " * 500}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps(hard) + "\n")
    asked = [
        *("evaluate", "tiny", "--suite", "leetcode", "--data", tmp_path / "problems.jsonl", "--samples", 2),
        *("--out", tmp_path / "out", "--store", runs / "store"),
    ]

    result = qrpo_json(*asked)

    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["pass_at_1"]["mean"] == 0, "a model of random weights wrote a program"
    assert (result["problems"], result["samples"]) == (1, 2)
    assert "exceed the engine's context" in result["refused"]["long"]
    solutions = [json.loads(line) for line in (tmp_path / "out" / "solutions.jsonl").read_text().splitlines()]
    kept = json.loads((tmp_path / "out" / "completions.json").read_text())
    assert [row["text"] for row in solutions] == kept["texts"]["one"]
    before = (tmp_path / "out" / "completions.json").stat().st_mtime_ns
    assert qrpo_json(*asked) == result
    assert (tmp_path / "out" / "completions.json").stat().st_mtime_ns == before


def test_run_without_checkpoints_says_so(write_task: Callable[..., Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    write_artifacts(store, "tiny")
    config = load_config(write_task(tmp_path / "task")).model_dump(mode="json")
    store.write_run("tiny", {**(store.run("tiny") or {}), "config": config})

    done = qrpo("evaluate", "tiny", "--checkpoint", "all", "--store", store.url)

    assert done.exit_code == 2
    assert (
        "no checkpoint all; its checkpoints: none; a training run with policy.checkpoint_steps" in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "no run named 'nobody'"),
        (["tiny", "--model", "x"], "expected NAME=PATH"),
        (["tiny", "--model", "policy=x"], "cannot name a model"),
        (["tiny", "--suite", "leetcode"], "with --data"),
        (["tiny", "--suite", "chess", "--data", "x"], "no suite 'chess'"),
        (["tiny", "--suite", "alpaca-eval", "--data", "x", "--which", "y"], "no model 'y'"),
        (["tiny", "--suite", "alpaca-eval", "--data", "x", "--judge", "adress=1"], "its settings are"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(runs: Path, arguments: list[str], message: str) -> None:
    done = qrpo("evaluate", *arguments, "--store", runs / "store")

    assert done.exit_code == 2, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
