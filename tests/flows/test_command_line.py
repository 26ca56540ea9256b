"""The `qrpo` command as a user types it: what each option does, what is printed for people and for machines, exit codes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from tests.support.flows import invoke, run_json

HOSTILE = (
    "[bold]x[/bold]",
    "<script>alert(1)</script>",
    "[/]",
    "\x1b[31mred",
    ":smile:",
    "a\tb\nc",
    "日本語",
)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path], prefect_server: str
) -> Path:
    """A folder with a run through `quantiles` whose data is hostile text; nothing is sampled twice from here."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {
            "prompt": f"say {number} {HOSTILE[number % len(HOSTILE)]}",
            "chosen": f"{HOSTILE[number % len(HOSTILE)]} yes",
            "rejected": "no",
            "answer": HOSTILE[number % len(HOSTILE)],
        }
        for number in range(21)
    ]
    config = write_task(
        folder / "task",
        rows=rows,
        quantiles__train_on="offline",
        completions__num_ref=2,
        prompts__eval_fraction=0.2,
    )
    summary = run_json("run", config, "--store", folder / "store", "--until", "quantiles")
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The configuration, and a copy of the run's store to be changed."""
    shutil.copytree(run / "store", tmp_path / "store")
    return run / "task" / "config.yaml", tmp_path / "store"


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


@pytest.mark.parametrize(
    "name", ["demo", "run", "plan", "ls", "show", "inspect", "browse", "theory", "serve", "deploy"]
)
def test_every_command_has_help(name: str) -> None:
    assert name in plain("--help")
    assert "Usage" in plain(name, "--help")


@pytest.mark.parametrize("name", ["run", "plan", "ls", "show", "verify", "gc", "serve", "deploy", "theory"])
def test_help_has_an_example(name: str) -> None:
    assert f"qrpo {name}" in plain(name, "--help").split("Example", 1)[-1]


def test_shell_completes_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "_QRPO_COMPLETE": "complete_bash",
        "COMP_WORDS": "qrpo run config.yaml --only re",
        "COMP_CWORD": "4",
    }

    result = CliRunner().invoke(app, [], prog_name="qrpo", env=environment)

    assert result.stdout.split() == ["reference", "rewards"]


def test_show_config_prints_every_default_with_its_meaning_and_reads_back(
    write_task: Callable[..., Path], tmp_path: Path
) -> None:
    shown = plain("run", write_task(tmp_path), "--show-config", "--set", "policy.beta=0.25")

    config = yaml.safe_load(shown)
    assert config["policy"]["beta"] == 0.25
    assert config["completions"]["sampling"]["temperature"] == 1.0
    assert "# Strength of the KL penalty to the reference; " in shown
    (tmp_path / "again.yaml").write_text(shown)
    assert plain("run", tmp_path / "again.yaml", "--show-config") == shown


def test_long_values_of_the_configuration_are_not_folded(
    write_task: Callable[..., Path], tmp_path: Path
) -> None:
    path = "x" * 300 + ".jsonl"

    shown = plain("run", write_task(tmp_path), "--show-config", "--set", f"prompts.source={path}")

    assert f"source: {path}" in shown


def test_unknown_option_and_no_command_are_usage_errors() -> None:
    assert invoke("run", "x.yaml", "--colour").exit_code == 2
    assert invoke().exit_code == 2


def test_only_together_with_from_is_a_usage_error(write_task: Callable[..., Path], tmp_path: Path) -> None:
    result = invoke("run", write_task(tmp_path), "--only", "rewards", "--from", "prompts")

    assert result.exit_code == 2
    assert "--only STAGE stands alone" in " ".join(result.stderr.replace("│", " ").split())


# Plan


def test_plan_of_an_empty_store_counts_the_parts_and_writes_nothing(
    write_task: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_task(tmp_path / "task", prompts=30)

    planned = parsed("plan", config, "--store", tmp_path / "store")

    stages = planned["stages"]
    assert planned["run"] == "tiny"
    assert next(iter(stages)) == "prompts"
    assert list(stages)[-1] == "evaluation"
    assert stages["prompts"]["parts_total"] > 1
    assert stages["completions"]["parts_total"] == 2 * stages["prompts"]["parts_total"]
    assert stages["policy"]["parts_total"] == 1
    assert all(stage["parts_cached"] == 0 for stage in stages.values())
    assert stages["reference"]["reasons"] == ["reference.sft is null: the model is taken as it is"]
    assert "no prompt is held out" in stages["evaluation"]["reasons"][0]
    assert stages["completions"]["reasons"] == ["prompts is computed anew"]
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_plan_for_people_says_what_and_why(run: Path) -> None:
    shown = plain(
        "plan",
        run / "task" / "config.yaml",
        *("--store", run / "store", "--set", "quantiles.ties=mid", "--set", "completions.num_ref=4"),
    )

    assert "nothing" in shown
    assert "quantiles.ties changed from weak to mid" in " ".join(shown.replace("│", " ").split())


@pytest.mark.slow
def test_plan_says_what_the_run_then_does(copy: tuple[Path, Path]) -> None:
    config, store = copy
    options = ("--store", store, "--set", "quantiles.ties=mid")
    planned = parsed("plan", config, *options)["stages"]

    done = parsed("run", config, *options, "--until", "quantiles")["stages"]

    for name, stage in done.items():
        assert stage["parts_cached"] == planned[name]["parts_cached"], name
        assert stage["parts_computed"] == planned[name]["parts_total"] - planned[name]["parts_cached"], name
    assert done["quantiles"]["parts_computed"] > 0
    assert done["rewards"]["parts_computed"] == 0


# Run


@pytest.mark.slow
def test_run_prints_a_summary_and_commands_to_look_at_it(run: Path) -> None:
    shown = plain("run", run / "task" / "config.yaml", "--store", run / "store", "--until", "quantiles")

    for stage in ("prompts", "completions", "rewards", "quantiles"):
        assert stage in shown
    assert "policy" not in shown
    assert "evaluation" not in shown
    suggested = [line.split() for line in shown.splitlines() if line.strip().startswith("qrpo ")]
    assert len(suggested) == 3
    for words in suggested:
        assert invoke(*words[1:]).exit_code == 0, words


@pytest.mark.slow
def test_run_from_and_until_go_through_those_stages_alone(run: Path) -> None:
    options = ("--store", run / "store", "--from", "completions", "--until", "rewards")

    stages = parsed("run", run / "task" / "config.yaml", *options)["stages"]

    assert list(stages) == ["completions", "rewards"]


@pytest.mark.slow
def test_run_only_one_stage(run: Path) -> None:
    options = ("--store", run / "store", "--only", "rewards")

    stages = parsed("run", run / "task" / "config.yaml", *options)["stages"]

    assert list(stages) == ["rewards"]
    assert stages["rewards"]["parts_computed"] == 0


@pytest.mark.slow
def test_force_computes_a_cached_stage_again_and_nothing_else(copy: tuple[Path, Path]) -> None:
    config, store = copy
    options = ("--store", store, "--until", "quantiles", "--force", "rewards")

    stages = parsed("run", config, *options)["stages"]

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
def test_ls_lists_runs_and_their_artifacts_in_the_stages_order(run: Path) -> None:
    listed = parsed("ls", "--store", run / "store")

    stages = listed["runs"]["tiny"]["stages"]
    assert list(stages) == ["prompts", "reference", "completions", "rewards", "quantiles"]
    assert stages["rewards"]["rows"] == stages["completions"]["rows"]
    assert stages["completions"]["bytes"] > 0
    shown = plain("ls", "--store", run / "store")
    assert stages["quantiles"]["fingerprint"][:12] in shown


def test_ls_of_an_empty_store_says_so(tmp_path: Path) -> None:
    assert parsed("ls", "--store", tmp_path / "store")["runs"] == {}
    assert "no run" in plain("ls", "--store", tmp_path / "store")


@pytest.mark.slow
def test_show_names_parts_that_exist_and_everything_that_made_them(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())["stages"]

    for stage in summary:
        shown = parsed("show", "tiny", stage, "--store", run / "store")
        assert shown["fingerprint"] == summary[stage]["fingerprint"]
        assert shown["rows"] == summary[stage]["rows"]
        assert all(Path(url).is_file() for url in shown["parts"])
        assert {"config", "inputs", "lineage", "code_version", "created", "seconds", "bytes"} <= shown.keys()
    person = plain("show", run / "task" / "config.yaml", "rewards", "--store", run / "store")
    assert summary["rewards"]["fingerprint"] in person


@pytest.mark.slow
def test_stage_that_was_not_run_is_told_with_the_remedy(run: Path) -> None:
    for name in ("show", "inspect"):
        result = invoke(name, "tiny", "shards", "--store", run / "store")

        assert result.exit_code == 1
        assert "run 'tiny' has no shards yet" in result.stderr
        assert "--until shards" in result.stderr


@pytest.mark.slow
def test_inspect_gives_columns_numbers_and_rows(run: Path) -> None:
    import polars as pl

    shown = parsed("inspect", "tiny", "rewards", "--store", run / "store", "--limit", "3")

    parts = parsed("show", "tiny", "rewards", "--store", run / "store")["parts"]
    rewards = pl.scan_parquet(parts).collect()["reward"]
    assert shown["columns"]["reward"] == "Float64"
    assert len(shown["samples"]) == 3
    assert shown["numbers"]["reward"]["count"] == len(rewards)
    assert shown["numbers"]["reward"]["mean"] == pytest.approx(rewards.mean())
    assert shown["numbers"]["reward"]["quantiles"][0] == rewards.min()
    assert shown["numbers"]["reward"]["quantiles"][-1] == rewards.max()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prompts", "completions", "rewards", "quantiles"])
def test_inspect_for_people_names_every_column_in_full(run: Path, stage: str) -> None:
    columns = parsed("inspect", "tiny", stage, "--store", run / "store")["columns"]

    shown = plain("inspect", "tiny", stage, "--store", run / "store")

    for column in columns:
        assert column in shown.split("╭")[0], "the table above the rows names it"


@pytest.mark.slow
def test_hostile_text_is_shown_as_it_is(run: Path) -> None:
    shown = plain("inspect", "tiny", "prompts", "--store", run / "store", "--limit", "21")

    for text in ("[bold]x[/bold]", "<script>alert(1)</script>", "[/]", ":smile:", "日本語"):
        assert text in shown
    assert "\x1b[31m" not in shown, "control characters of the data must not reach the terminal"


@pytest.mark.slow
def test_one_prompt_is_followed_through_the_stages(run: Path) -> None:
    options = ("--store", run / "store")
    samples = parsed("inspect", "tiny", "prompts", *options, "--limit", "21")["samples"]
    prompt = next(
        row for row in samples if row["split"] == "train" and "bold" in row["messages"][0]["content"]
    )

    followed = parsed("inspect", "tiny", "prompts", *options, "--prompt-id", prompt["prompt_id"][:12])
    shown = plain("inspect", "tiny", "prompts", *options, "--prompt-id", prompt["prompt_id"][:12])

    assert followed["prompt_id"] == prompt["prompt_id"]
    stages = followed["stages"]
    assert {row["origin"] for row in stages["completions"]} == {"offline", "reference"}
    assert len(stages["completions"]) == len(stages["rewards"]) == 4
    assert stages["quantiles"][0]["origin"] == ["offline", "offline"]
    assert "[bold]x[/bold] yes" in shown
    assert "completions by reward" in shown


@pytest.mark.slow
def test_prompt_id_that_is_unknown_or_not_unique_is_told(run: Path) -> None:
    for prefix, expected in (("zzzz", "no prompt of run 'tiny' has an id"), ("", "give more of it")):
        result = invoke("inspect", "tiny", "prompts", "--store", run / "store", "--prompt-id", prefix)

        assert result.exit_code == 1
        assert expected in result.stderr
        assert "Traceback" not in result.stderr


# Theory


@pytest.mark.slow
def test_theory_gives_numbers_for_machines_and_a_table_for_people() -> None:
    promised = parsed("theory", "--beta", "0.1", "--num-ref", "20")

    assert promised["beta"] == 0.1
    assert 0.5 < promised["win_rate"] < 1
    assert promised["by_num_ref"]
    assert "log Z" in plain("theory", "--beta", "0.1")


@pytest.mark.parametrize(
    "arguments", [("--beta", "0"), ("--beta", "-1"), ("--transform", "sigmod"), ("--num-ref", "0")]
)
def test_theory_refuses_what_has_no_meaning(arguments: tuple[str, str]) -> None:
    result = invoke("theory", *arguments)

    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_theory_draws_a_plot(tmp_path: Path) -> None:
    result = invoke("theory", "--beta", "0.2", "--plot", tmp_path / "theory.png")

    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
