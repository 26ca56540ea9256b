"""The `qrpo` command as a user types it: what each option does, what is printed for people and for machines, exit codes."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from flows.cli import app
from tasks.stages import STAGE_NAMES
from tests.support.flows import invoke, run_json, unfolded


@pytest.fixture
def copy(trained: Path, copy_of: Callable[[Path], Path]) -> tuple[Path, Path]:
    """The configuration of the run `tiny`, and a copy of its store to be changed."""
    return trained / "config.yaml", copy_of(trained)


def parsed(*arguments: Any) -> dict[str, Any]:
    """The one JSON object that the command prints on standard output."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def plain(*arguments: Any) -> str:
    """What the command prints for people."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


# Help and configuration


def test_every_command_has_help_with_an_example() -> None:
    listed = plain("--help")
    group: Any = typer.main.get_command(app)
    for name in group.commands:
        assert name in listed
        shown = plain(name, "--help")
        assert "Usage" in shown
        if name not in ("browse", "report"):
            assert f"qrpo {name}" in shown.split("Example", 1)[-1]


def test_shell_completes_stages() -> None:
    words = {"COMP_WORDS": "qrpo run config.yaml --only re", "COMP_CWORD": "4"}
    environment = {"_QRPO_COMPLETE": "complete_bash", **words}

    result = CliRunner().invoke(app, [], prog_name="qrpo", env=environment)

    assert result.stdout.split() == ["reference", "rewards"]


def test_show_config_prints_every_default_with_its_meaning_and_reads_back(
    write_task: Callable[..., Path], tmp_path: Path
) -> None:
    path = "x" * 300 + ".jsonl"
    options = ("--set", "policy.beta=0.25", "--set", f"prompts.source={path}")

    shown = plain("run", write_task(tmp_path), "--show-config", *options)

    config = yaml.safe_load(shown)
    assert config["policy"]["beta"] == 0.25
    assert config["completions"]["sampling"]["temperature"] == 1.0
    assert "# Strength of the KL penalty to the reference; " in shown
    assert f"source: {path}" in shown, "long values are not folded"
    (tmp_path / "again.yaml").write_text(shown)
    assert plain("run", tmp_path / "again.yaml", "--show-config") == shown


def test_version_is_that_of_the_package() -> None:
    assert plain("--version").strip() == importlib.metadata.version("qrpo-pipeline")


def test_init_writes_a_configuration_with_comments_that_plan_accepts(
    write_task: Callable[..., Path], base_model: Path, tmp_path: Path
) -> None:
    write_task(tmp_path / "task")
    prompts, reward = tmp_path / "task" / "prompts.jsonl", f"{tmp_path / 'task' / 'reward.py'}:reward"
    config = tmp_path / "new.yaml"
    flags = ("--prompts", prompts, "--model", base_model, "--reward", reward)

    said = plain("init", config, *flags, "--set", "completions.engine.kind=transformers")

    assert f"qrpo run {config}" in said
    assert "# Strength of the KL penalty" in config.read_text()
    assert parsed("plan", config, "--store", tmp_path / "store")["run"] == "new"
    again = invoke("init", config, *flags)
    assert (again.exit_code, "exists" in again.stderr) == (2, True)


# Plan and run


def test_plan_of_an_empty_store_counts_the_parts_and_writes_nothing(
    write_task: Callable[..., Path], tmp_path: Path
) -> None:
    planned = parsed("plan", write_task(tmp_path / "task", prompts=30), "--store", tmp_path / "store")

    stages = planned["stages"]
    assert planned["run"] == "tiny"
    assert tuple(stages) == STAGE_NAMES
    assert stages["prompts"]["parts_total"] > 1
    assert stages["completions"]["parts_total"] == 2 * stages["prompts"]["parts_total"]
    assert stages["policy"]["parts_total"] == 1
    assert all(stage["parts_cached"] == 0 for stage in stages.values())
    assert stages["reference"]["reasons"] == ["reference.sft is null: the model is taken as it is"]
    assert "no prompt is held out" in stages["evaluation"]["reasons"][0]
    assert stages["completions"]["reasons"] == ["prompts is computed anew"]
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_plan_says_what_the_run_then_does_and_why(copy: tuple[Path, Path]) -> None:
    config, store = copy
    options = ("--store", store, "--set", "quantiles.ties=mid")

    planned = parsed("plan", config, *options)["stages"]
    shown = plain("plan", config, *options)
    done = parsed("run", config, *options, "--until", "quantiles")["stages"]

    assert "nothing" in shown
    assert "quantiles.ties changed from weak to mid" in unfolded(shown)
    for name, stage in done.items():
        assert stage["parts_cached"] == planned[name]["parts_cached"], name
        assert stage["parts_computed"] == planned[name]["parts_total"] - planned[name]["parts_cached"], name
    assert done["quantiles"]["parts_computed"] > 0
    assert done["rewards"]["parts_computed"] == 0


@pytest.mark.slow
def test_run_prints_a_summary_and_commands_to_look_at_it(copy: tuple[Path, Path]) -> None:
    config, store = copy
    shown = plain("run", config, "--store", store, "--until", "quantiles")

    for stage in ("prompts", "completions", "rewards", "quantiles"):
        assert stage in shown
    assert "policy" not in shown
    assert "evaluation" not in shown
    suggested = [line.split() for line in shown.splitlines() if line.strip().startswith("qrpo ")]
    assert len(suggested) == 3
    for words in suggested:
        assert invoke(*words[1:]).exit_code == 0, words


@pytest.mark.slow
def test_run_says_where_its_model_is_and_export_copies_it(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = ("--store", trained / "store")
    shown = plain("run", trained / "config.yaml", *options)
    model = parsed("run", trained / "config.yaml", *options)["model"]

    assert f"model: {model}" in shown
    assert f"vllm serve {model}" in shown
    assert f"generate = pipeline('text-generation', '{model}')" in shown
    assert "vllm serve" in plain("export", "tiny", tmp_path / "model", *options)
    weights = [
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, tmp_path / "model")
    ]
    assert all((value == weights[1][name]).all() for name, value in weights[0].items())
    assert not (tmp_path / "model" / "checkpoints").exists()
    assert invoke("export", "tiny", tmp_path / "model", *options).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "stages"),
    [
        (["--from", "completions", "--until", "rewards"], ["completions", "rewards"]),
        (["--only", "rewards"], ["rewards"]),
    ],
)
def test_run_goes_through_the_stages_of_the_span_alone(
    trained: Path, options: list[str], stages: list[str]
) -> None:
    done = parsed("run", trained / "config.yaml", "--store", trained / "store", *options)["stages"]

    assert list(done) == stages
    assert all(stage["parts_computed"] == 0 for stage in done.values())


@pytest.mark.slow
def test_force_computes_a_cached_stage_again_and_nothing_else(copy: tuple[Path, Path]) -> None:
    config, store = copy

    stages = parsed("run", config, "--store", store, "--until", "quantiles", "--force", "rewards")["stages"]

    assert stages["rewards"]["parts_cached"] == 0
    assert stages["rewards"]["parts_computed"] > 0
    assert stages["completions"]["parts_computed"] == 0
    assert stages["quantiles"]["parts_computed"] == 0, "the same bytes came"


@pytest.mark.slow
def test_name_and_store_come_from_options_and_environment(
    copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = copy
    monkeypatch.setenv("QRPO_STORE", str(store))

    done = parsed("run", config, "--until", "quantiles", "--set", "name=second")

    assert (done["run"], done["store"]) == ("second", str(store))
    assert all(stage["parts_computed"] == 0 for stage in done["stages"].values())
    assert set(parsed("ls")["runs"]) == {"second", "tiny"}


# Look at it


@pytest.mark.slow
def test_ls_and_show_name_what_is_there_and_everything_that_made_it(trained: Path) -> None:
    options = ("--store", trained / "store")
    stages = parsed("ls", *options)["runs"]["tiny"]["stages"]
    listed = plain("ls", "-l", *options)

    assert list(stages)[:5] == ["prompts", "reference", "completions", "rewards", "quantiles"]
    assert stages["rewards"]["rows"] == stages["completions"]["rows"]
    assert stages["completions"]["bytes"] > 0
    for stage, entry in stages.items():
        assert entry["fingerprint"][:12] in listed
        shown = parsed("show", "tiny", stage, *options)
        assert (shown["fingerprint"], shown["rows"]) == (entry["fingerprint"], entry["rows"])
        assert all(Path(url).is_file() for url in shown["parts"])
        assert {"config", "inputs", "lineage", "code_version", "created", "seconds", "bytes"} <= shown.keys()
    short = plain("ls", *options)
    assert sum("tiny" in line for line in short.splitlines()) == 1
    assert max(len(line) for line in (short + listed).splitlines() if str(trained) not in line) <= 80
    assert stages["rewards"]["fingerprint"] in plain("show", trained / "config.yaml", "rewards", *options)


def test_ls_of_an_empty_store_says_so(tmp_path: Path) -> None:
    assert parsed("ls", "--store", tmp_path / "store")["runs"] == {}
    assert "no run" in plain("ls", "--store", tmp_path / "store")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prompts", "completions", "rewards", "quantiles"])
def test_inspect_for_people_names_every_column_in_full(trained: Path, stage: str) -> None:
    command = ("inspect", "tiny", stage, "--store", trained / "store")

    table = plain(*command).split("╭")[0]  # above the rows

    assert not [column for column in parsed(*command)["columns"] if column not in table]


@pytest.mark.slow
def test_stage_that_was_not_run_is_told_with_the_remedy(
    write_task: Callable[..., Path], tmp_path: Path, prefect_server: str
) -> None:
    options = ("--store", tmp_path / "store")
    run_json("run", write_task(tmp_path / "task"), *options, "--until", "prompts")
    for name in ("show", "inspect"):
        result = invoke(name, "tiny", "shards", *options)

        assert result.exit_code == 1
        assert "run 'tiny' has no shards yet" in result.stderr
        assert "--until shards" in result.stderr


# Theory


@pytest.mark.slow
def test_theory_gives_numbers_for_machines_a_table_for_people_and_a_plot(tmp_path: Path) -> None:
    promised = parsed("theory", "--beta", "0.1", "--num-ref", "20", "--plot", tmp_path / "theory.png")

    assert promised["beta"] == 0.1
    assert 0.5 < promised["win_rate"] < 1
    assert promised["by_num_ref"]
    assert "log Z" in plain("theory", "--beta", "0.1")
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")


# Usage errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), ""),
        (("run", "{config}", "--colour"), "--colour"),
        (("run", "{config}", "--only", "rewards", "--from", "prompts"), "--only STAGE stands alone"),
        (("run", "{config}", "--from", "rewards", "--until", "prompts"), "comes after --until prompts"),
        (("run", "{config}", "--from", "reward"), "no stage 'reward'; the stages are prompts, "),
        (("run", "{config}", "--until", "reward"), "completions, rewards, quantiles"),
        (("run", "{config}", "--only", "reward"), "no stage 'reward'"),
        (("run", "{config}", "--force", "reward"), "no stage 'reward'"),
        (("inspect", "tiny", "rewards", "--sample", "2", "--limit", "3"), "both say how many rows"),
        (("theory", "--beta", "0"), ""),
        (("theory", "--beta", "-1"), ""),
        (("theory", "--transform", "sigmod"), "sigmod"),
        (("theory", "--num-ref", "0"), ""),
    ],
)
def test_what_has_no_meaning_is_a_usage_error(
    write_task: Callable[..., Path], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    config = str(write_task(tmp_path))

    result = invoke(*(word.replace("{config}", config) for word in arguments))

    assert result.exit_code == 2
    assert message in unfolded(result.stderr)
    assert "Traceback" not in result.stderr
