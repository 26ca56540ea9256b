"""What a user gets wrong: one readable line with place and remedy, the right exit code, and nothing lost that was computed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.service.server import server_is_named
from qrpo.errors import ConfigError
from tests.support.flows import invoke, run_json

USAGE, FAILED = 2, 1


@pytest.fixture(scope="module")
def sampled(
    tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path], prefect_server: str
) -> Path:
    """A folder with a task whose completions are there, and one unreadable line 17 in its source."""
    folder = tmp_path_factory.mktemp("sampled")
    rows: list[Any] = [{"prompt": f"say {number}", "answer": "a"} for number in range(24)]
    rows[16] = '{"prompt": "say 16", "answer": '
    rows[19] = {"prompt": "   ", "answer": "a"}
    rows[21] = {"prompt": "word " * 100, "answer": "a"}
    config = write_task(folder / "task", rows=rows, run__max_reject_fraction=0.2)
    done = invoke("run", config, "--store", folder / "store", "--until", "completions", "--json")
    assert done.exit_code == 0, done.stderr
    (folder / "summary.json").write_text(done.stdout)
    (folder / "said.txt").write_text(done.stderr)
    return folder


@pytest.fixture
def scored(sampled: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run the rewards of a copy of `sampled` with this source as reward function; the result and the store."""

    def run(source: str, *options: str) -> tuple[Any, Path]:
        store, reward = tmp_path / "store", tmp_path / "bad_reward.py"
        shutil.copytree(sampled / "store", store, dirs_exist_ok=True)
        reward.write_text(source)
        arguments = ("--only", "rewards", "--set", f"rewards.0.function={reward}:reward", *options)
        return invoke("run", sampled / "task" / "config.yaml", "--store", store, *arguments), store

    return run


def one_line(result: Any, exit_code: int) -> str:
    """The error line, after the checks that hold for all of them."""
    assert result.exit_code == exit_code, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert len(lines[0]) < 1000
    return str(lines[0])


def reject_rows(store: Path, stage: str) -> list[dict[str, Any]]:
    return pl.read_parquet(run_json("show", "tiny", stage, "--store", store)["rejects_file"]).to_dicts()


# Rows that cannot be used


@pytest.mark.slow
def test_unusable_rows_are_rejects_with_their_place_and_the_run_goes_on(sampled: Path) -> None:
    stages = json.loads((sampled / "summary.json").read_text())["stages"]
    rejects = {reject["key"]: reject["reason"] for reject in reject_rows(sampled / "store", "prompts")}

    source = sampled / "task" / "prompts.jsonl"
    assert stages["prompts"]["rows"] == 22
    assert stages["prompts"]["rejects"] == 2
    assert set(rejects) == {f"{source}:17", f"{source}:20"}
    assert "not valid JSON" in rejects[f"{source}:17"]
    assert "the prompt is empty" in rejects[f"{source}:20"]
    shown = "prompts: 2 of 24 rows cannot be used; reasons in "
    (line,) = [line for line in (sampled / "said.txt").read_text().splitlines() if line.startswith(shown)]
    assert Path(line.removeprefix(shown)).is_file(), "the path can be copied from the terminal"


@pytest.mark.slow
def test_prompt_longer_than_the_context_is_a_reject_of_completions(sampled: Path) -> None:
    stages = json.loads((sampled / "summary.json").read_text())["stages"]

    (first, *others) = reject_rows(sampled / "store", "completions")
    assert stages["completions"]["rows"] == 21 * 4
    assert "exceed the engine's context of 64 tokens" in first["reason"]
    assert first["prompt_id"] == first["key"]
    assert {other["key"] for other in others} <= {first["key"]}
    assert "completions: 4 of 88 rows cannot be used" in (sampled / "said.txt").read_text()


@pytest.mark.slow
def test_rows_whose_reward_raises_or_is_no_number_are_rejects_and_the_others_are_scored(
    scored: Callable[..., Any],
) -> None:
    source = (
        "def reward(prompts, completions, **columns):\n"
        "    if 'say 3' in prompts:\n"
        "        raise ValueError('cannot judge 3')\n"
        "    special = {'say 4': float('nan'), 'say 5': None}\n"
        "    return [special.get(prompt, 1.0 * len(text)) for prompt, text in zip(prompts, completions)]\n"
    )

    done, store = scored(source, "--set", "run.max_reject_fraction=0.2", "--json")

    assert done.exit_code == 0, done.stderr
    assert "rewards: 12 of 84 rows cannot be used; reasons in " in done.stderr
    assert json.loads(done.stdout)["stages"]["rewards"]["rejects"] == 12
    reasons = [reject["reason"] for reject in reject_rows(store, "rewards")]
    raised = [reason for reason in reasons if "ValueError: cannot judge 3" in reason]
    assert len(raised) == 4
    assert all("bad_reward.py:3" in reason for reason in raised)
    others = set(reasons) - set(raised)
    assert len(others) == 2
    assert any("nan" in reason and "expected a finite number" in reason for reason in others)
    assert any("no reward applies" in reason for reason in others)


# Rewards that fail as a whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def reward(completions, **columns):\n    raise KeyError('score')\n", "KeyError: 'score'"),
        (
            "def reward(completions, **columns):\n    return [1.0, 2.0, 3.0]\n",
            "returned 3 rewards for 1 completions",
        ),
        ("def reward(completions, **columns):\n    return 1.0\n", "returned float, expected a list"),
        (
            "def reward(completions, gold):\n    return [1.0 for _ in gold]\n",
            "it wants gold, which the data does not have",
        ),
        ("import no_such_package\n\ndef reward(completions):\n    return []\n", "no_such_package"),
    ],
    ids=["raises", "wrong count", "no list", "missing column", "import fails"],
)
def test_reward_that_fails_on_every_row_is_one_line(
    scored: Callable[..., Any], source: str, expected: str
) -> None:
    done, store = scored(source)

    line = one_line(done, FAILED)
    assert expected in line
    assert "bad_reward.py" in line
    completions = run_json("show", "tiny", "completions", "--store", store)
    assert completions["rows"] == 84, "what was computed before is still there"


@pytest.mark.slow
def test_more_lost_than_allowed_stops_the_run_and_keeps_what_was_scored(scored: Callable[..., Any]) -> None:
    source = "def reward(prompts, completions):\n    return [1.0 if p < 'say 2' else float('inf') for p in prompts]\n"

    done, _ = scored(source)

    line = one_line(done, FAILED)
    assert "rewards:" in line
    assert "run.max_reject_fraction is 20%" in line
    assert "expected a finite number" in line
    assert "rejects.parquet" in line
    again = scored(source, "--set", "run.max_reject_fraction=1.0", "--json")[0]
    assert again.exit_code == 0
    assert json.loads(again.stdout)["stages"]["rewards"]["parts_computed"] == 0


# Before anything starts: no Prefect server, no engine


@pytest.mark.parametrize(
    ("changes", "options", "exit_code", "expected"),
    [
        ({"prompts__source": "nowhere/a.jsonl"}, "", FAILED, "no file nowhere/a.jsonl.*: fix the path"),
        ({"policy__betta": 0.1}, "", USAGE, r"{tmp}/config.yaml: policy.betta: .* did you mean `beta`\?"),
        (
            {"reference__model": {"path": "{tmp}/none"}},
            "",
            FAILED,
            "no model folder {tmp}/none: fix the path",
        ),
        ({"reference__model": {"path": "{tmp}"}}, "", FAILED, "{tmp} has no config.json"),
        ({}, "--set policy.beta", USAGE, "expected key.path=value"),
        ({}, "--set policy.beta=-1", USAGE, "policy.beta: Input should be greater than 0"),
        ({}, "--set completions.sampling.max_token=3", USAGE, r"did you mean `max_tokens`\?"),
        ({}, "--set rewards.3.weight=1", USAGE, "is a list of 1"),
        ({}, "--set policy.transform=sigmod", USAGE, "sigmod"),
        ({}, "--set rewards.0.function={tmp}/none.py:reward", USAGE, "no file {tmp}/none.py"),
        ({}, "--store {tmp}/reward.py", FAILED, "{tmp}/reward.py"),
        ({}, "--store s4://bucket/folder", FAILED, "s4.*s3://"),
        ({}, "--only rewards", USAGE, "has not run yet"),
    ],
)
def test_mistake_is_named_before_anything_starts(
    write_task: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, Any],
    options: str,
    exit_code: int,
    expected: str,
) -> None:
    changes = json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path)))
    words = options.replace("{tmp}", str(tmp_path)).split()
    config = write_task(tmp_path, **changes)

    line = one_line(invoke("run", config, "--store", tmp_path / "store", *words), exit_code)

    assert re.search(expected.replace("{tmp}", re.escape(str(tmp_path))), line)
    assert "Prefect" not in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "absent.yaml"), "no such configuration file"),
        (("show", "nobody", "rewards"), "no run named 'nobody'"),
        (("report", "nobody"), "no run named 'nobody'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in one_line(invoke(*arguments, "--store", tmp_path / "store"), USAGE)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        (("tokenizer*", "special_tokens_map*", "chat_template*"), "tokenizer.save_pretrained"),
        (("chat_template*",), "chat_template.jinja"),
    ],
    ids=["tokenizer", "chat template"],
)
def test_model_without_a_file_is_named_with_the_remedy(
    write_task: Callable[..., Path], base_model: Path, tmp_path: Path, missing: tuple[str, ...], remedy: str
) -> None:
    model = Path(shutil.copytree(base_model, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    for path in [path for pattern in missing for path in model.glob(pattern)]:
        path.unlink()
    config = write_task(tmp_path / "task", reference__model={"path": str(model)})

    line = one_line(invoke("run", config, "--store", tmp_path / "store"), FAILED)

    assert str(model) in line
    assert remedy in line


@pytest.mark.slow
def test_stage_alone_whose_parents_are_missing_says_what_to_run_first(sampled: Path) -> None:
    config = sampled / "task" / "config.yaml"

    line = one_line(invoke("run", config, "--store", sampled / "store", "--only", "quantiles"), USAGE)

    assert "quantiles: its parent stage rewards is not complete" in line
    assert "--until rewards" in line


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], ""),
        (["not json", "nor this"], "not valid JSON"),
        ([{"question": "what?"}] * 3, "prompts.columns"),
    ],
    ids=["empty", "no JSON", "no prompt"],
)
def test_source_without_one_usable_prompt_is_named_with_the_reason(
    write_task: Callable[..., Path], tmp_path: Path, lines: list[Any], reason: str
) -> None:
    config = write_task(tmp_path, rows=lines)

    line = one_line(invoke("run", config, "--store", tmp_path / "store"), FAILED)

    assert "no usable prompt in" in line
    assert reason in line


@pytest.mark.parametrize("name", ["tasks", "storage"])
def test_package_of_the_same_name_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    command = [sys.executable, "-c", "import flows"]

    shadowed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    safe = subprocess.run(
        [sys.executable, "-P", *command[1:]], cwd=tmp_path, capture_output=True, timeout=120
    )

    assert f"ImportError: {tmp_path / name} is another package than the `{name}`" in shadowed.stderr
    assert safe.returncode == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("run", tmp_path / "absent.yaml", "--debug")

    assert result.exit_code != 0
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


def test_the_server_of_the_active_profile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    profiles = tmp_path / "profiles.toml"

    assert not server_is_named()
    profiles.write_text(
        'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://here:1/api"\n[profiles.local]\n'
    )
    monkeypatch.setenv("PREFECT_PROFILE", "local")
    assert not server_is_named()
    monkeypatch.delenv("PREFECT_PROFILE")
    assert server_is_named()
    assert os.environ["PREFECT_API_URL"] == "http://here:1/api"
    monkeypatch.delenv("PREFECT_API_URL")
    profiles.write_text("[")
    with pytest.raises(ConfigError, match=r"profiles\.toml is no TOML"):
        server_is_named()
