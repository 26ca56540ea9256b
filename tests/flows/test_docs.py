"""The documentation: the site builds without a broken link, and what readers copy works."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import storage
from examples import prefect_flow, trl_dataset
from flows.cli import app
from qrpo.tiny import build_tiny_model
from tasks.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "deployments/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[str]:
    """Lines of indented blocks and inline code that start with `qrpo COMMAND`."""
    text = path.read_text().replace("\\\n", " ")
    shown = re.findall(r"^ {4}(qrpo [^#\n]+)", text, re.MULTILINE)
    return [line.strip() for line in shown + re.findall(r"`(qrpo [a-z]+ [^`\n]+)`", text)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_options_and_settings_of_a_page_exist(path: Path, tmp_path: Path) -> None:
    group: Any = typer.main.get_command(app)
    for line in commands(path):
        _, name, *arguments = shlex.split(line)
        options = {option for parameter in group.commands[name].params for option in parameter.opts}
        used = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert used <= options, line
    for block in blocks(path, "yaml"):
        base = {"prompts": {"source": "x"}, "reference": {"model": {"path": "x"}}}
        base["completions"] = {"num_ref": 2}
        base["rewards"] = [{"kind": "function", "function": "x.py:f"}]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(base | yaml.safe_load(block)))
        load_config(tmp_path / "config.yaml")


@pytest.mark.slow
def test_readme_is_short_and_its_code_runs(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 150
    (code,) = blocks(readme, "python")
    assert len(code.splitlines()) <= 30
    build_tiny_model(tmp_path / "demo" / "base", ["sort cab"], vocab_size=300)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "policy" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    configuration = (tmp_path / "reference" / "configuration" / "index.html").read_text()
    assert "<code>num_ref</code>" in configuration
    assert "<code>token_budget</code>" in configuration


@pytest.mark.slow
def test_the_example_of_a_trl_dataset_trains_evaluates_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_tiny_model(tmp_path / "model", ["sort cab"], vocab_size=300)
    row = {"prompt": "sort cab", "completion": "abc", "reward": 0.8, "ref_rewards": [0.2, 0.5, 0.9]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(40)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["trl_dataset", "--model", str(model), "--data", "rows.jsonl"])

    trl_dataset.main()

    assert "eval_loss" in capsys.readouterr().out
    assert (tmp_path / "policy" / "adapter_model.safetensors").is_file()
    (checkpoint,) = (tmp_path / "policy").glob("checkpoint-*")
    before = (checkpoint / "trainer_state.json").stat().st_mtime_ns
    trl_dataset.main()  # nothing is left to train
    assert (checkpoint / "trainer_state.json").stat().st_mtime_ns == before


def test_the_example_of_a_flow_counts_the_flat_prompts(
    trained: Path, copy_of: Callable[[Path], Path], prefect_server: str
) -> None:
    store = copy_of(trained)
    quantiles = storage.open(store, "tiny", "quantiles").lazy.collect()
    flat = [len(set(rewards)) == 1 for rewards in quantiles["ref_rewards"].to_list()]
    assert prefect_flow.refresh_quantiles(str(trained / "config.yaml"), str(store)) == sum(flat) / len(flat)
