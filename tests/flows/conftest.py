"""A tiny task to run the whole pipeline on, and the `qrpo` command."""

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from storage import Store
from tests.support.flows import QRPO, clean_environment, copy_store, invoke, run_json

REWARD = '''\
"""How many of the letters asked for were said, and a little less for every word."""

from weights import LETTER, WORD


def reward(prompts, completions, answer, **columns):
    return [
        LETTER * sum(letter in right for letter in said) - WORD * len(said.split())
        for said, right in zip(completions, answer, strict=True)
    ]
'''


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that knows the task's words, float32, 64 tokens of context."""
    from qrpo.tiny import build_tiny_model

    texts = [f"{row['prompt']} {row['chosen']}" for row in make_rows(60)]
    # two heads of 32: vLLM's CPU attention refuses smaller heads
    folder = tmp_path_factory.mktemp("base") / "model"
    return build_tiny_model(folder, texts, hidden_size=64, heads=2, layers=1, vocab_size=300, max_length=64)


@pytest.fixture(scope="session")
def write_task(base_model: Path) -> Callable[..., Path]:
    """Write prompts, reward and configuration into a folder; `changes` go into the configuration by dotted key."""

    def write(folder: Path, *, prompts: int = 24, rows: list[Any] | None = None, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / "prompts.jsonl", make_rows(prompts) if rows is None else rows)
        (folder / "reward.py").write_text(REWARD)
        (folder / "weights.py").write_text("LETTER = 0.25\nWORD = 0.125\n")
        config: dict[str, Any] = {
            "name": "tiny",
            "prompts": {"source": str(folder / "prompts.jsonl")},
            "reference": {"model": {"path": str(base_model)}},
            "completions": {
                "num_ref": 4,
                "samples_per_part": 2,
                "engine": {"kind": "transformers", "max_num_seqs": 64},
                "sampling": {"max_tokens": 12},
            },
            "rewards": [
                {"kind": "function", "name": "letters", "function": f"{folder / 'reward.py'}:reward"}
            ],
            "policy": {"learning_rate": 1e-3, "num_train_epochs": 2, "prompts_per_step": 8, "save_steps": 2},
            "run": {"part_size": 8},
        }
        for path, value in changes.items():
            *sections, key = path.split("__")
            target = config
            for section in sections:
                target = target[int(section)] if isinstance(target, list) else target.setdefault(section, {})
            target[key] = value
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture(scope="session")
def trained(
    write_task: Callable[..., Path], prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with `config.yaml` and a `store` that holds its run `tiny`, evaluated. To be copied, not changed: `copy_of`.

    Made once for all workers of pytest-xdist: the first one that needs it makes it, another one waits.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.yaml").exists():
            shutil.rmtree(folder, ignore_errors=True)
            config = write_task(
                folder,
                prompts__eval_fraction=0.4,
                policy__num_train_epochs=1,
                policy__checkpoint_steps=1,
                evaluation__num_samples=2,
                run__cpu_threads=1,
            )
            unfinished = config.rename(folder / "unfinished.yaml")
            memory = "memory://trained"  # there shards, policy and evaluation are computed in this process
            run_json("run", unfinished, "--store", memory)
            copy_store(Store(memory), Store(folder / "store"), without=("leases/",))
            unfinished.rename(config)
    return folder


@pytest.fixture(scope="session")
def copy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A copy of the store in a folder, to go on from."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder / "store", tmp_path_factory.mktemp("copy") / "store"))

    return copy


@pytest.fixture
def qrpo(prefect_server: str) -> Callable[..., Any]:
    """The `qrpo` command in this process, with the session's Prefect server: `.exit_code`, `.stdout`, `.stderr`."""
    return invoke


@pytest.fixture(scope="session")
def qrpo_process() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The `qrpo` command as another process. It starts a Prefect server unless `environment` names one."""

    def run(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [QRPO, *map(str, arguments)],
            env=clean_environment(**environment),
            capture_output=True,
            text=True,
            timeout=400,
        )

    return run


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, tuple[int, str]]]:
    """Every file under a folder with the time of its last change in nanoseconds and its sha256."""

    def take(folder: Path) -> dict[str, tuple[int, str]]:
        return {
            path.relative_to(folder).as_posix(): (
                path.stat().st_mtime_ns,
                hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return take


@pytest.fixture(scope="session")
def write_artifacts() -> Callable[..., None]:
    """`tests.support.views.write_artifacts`."""
    from tests.support import views

    return views.write_artifacts


def make_rows(count: int) -> list[dict[str, str]]:
    rng = random.Random(7)
    rows = []
    for number in range(count):
        letters = [rng.choice("abcdefgh") for _ in range(4)]
        rows.append(
            {
                "prompt": f"say {number}: {' '.join(letters)}",
                "chosen": " ".join(letters),
                "rejected": " ".join(reversed(letters)),
                "answer": "".join(letters),
            }
        )
    return rows


def write_lines(path: Path, rows: list[Any]) -> None:
    """One JSON object a line; a string is written as it is, so that a line can be broken."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
