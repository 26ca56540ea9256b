"""What would stop a run is said by `qrpo plan` and before a run's first sample, all of it at once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.flows import QRPO, invoke, unfolded

NO_COLUMN = "def reward(completions, gold):\n    return [1.0 for _ in gold]\n"
WRONG_CODE = "from tests_without_a_module import x\n"


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reward": NO_COLUMN}, "it wants gold, which the data does not have"),
        ({"reward": "def reward(completions):\n    return [lenght(x) for x in completions]\n"}, "NameError"),
        ({"reward": WRONG_CODE}, "No module named 'tests_without_a_module'"),
        ({"rewards": [{"kind": "code"}], "path": ""}, "no `bwrap` here. Install it"),
        ({"weights": b"\x00" * 30}, "its weights"),
        ({"chat_template": True}, "has no chat template"),
        ({"store": "/proc/qrpo"}, "the store /proc/qrpo cannot be written"),
        ({"policy__lora": {"rank": 2}, "without": "peft"}, "lora needs peft, which is not installed: "),
    ],
    ids=["column", "code", "import", "bubblewrap", "weights", "template", "store", "extra"],
)
def test_problem_is_said_before_anything_is_computed(
    command: str,
    changes: dict[str, Any],
    expected: str,
    write_task: Callable[..., Path],
    base_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Path(shutil.copytree(base_model, tmp_path / "model"))
    settings = {key: value for key, value in changes.items() if "__" in key or key == "rewards"}
    config = write_task(tmp_path / "task", reference__model={"path": str(model)}, **settings)
    if "reward" in changes:
        (config.parent / "reward.py").write_text(changes["reward"])
    if "weights" in changes:
        (model / "model.safetensors").write_bytes(changes["weights"])
    if "chat_template" in changes:
        (model / "chat_template.jinja").unlink()
        tokenizer = json.loads((model / "tokenizer_config.json").read_text())
        tokenizer.pop("chat_template", None)
        (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if "path" in changes:
        monkeypatch.setenv("PATH", changes["path"])
    if "without" in changes:
        monkeypatch.setitem(sys.modules, changes["without"], None)
    store = changes.get("store", tmp_path / "store")

    done = invoke(command, config, "--store", store)

    assert done.exit_code in (1, 2), done.stdout
    assert expected in unfolded(done.stdout + done.stderr)
    assert "Prefect" not in done.stderr
    assert not list(tmp_path.glob("store/*"))


def test_all_problems_are_listed_at_once(write_task: Callable[..., Path], tmp_path: Path) -> None:
    config = write_task(tmp_path, reference__model={"path": str(tmp_path / "none")})
    (tmp_path / "reward.py").write_text(NO_COLUMN)
    for command in ("plan", "run"):
        done = invoke(command, config, "--store", "/proc/qrpo")

        assert done.exit_code == 2
        for problem in ("3 problems", "cannot be written", "no model folder", "it wants gold"):
            assert problem in unfolded(done.stderr)


def test_disk_without_room_for_the_model_is_said(write_task: Callable[..., Path], tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("no rights to mount a small file system here")
    config, store = write_task(tmp_path), tmp_path / "store"
    store.mkdir()
    command = f"mount -t tmpfs -o size=64k tmpfs {store} && {QRPO} plan {config} --store {store}"

    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command], capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 1, done.stderr
    assert "MiB free, and the trained model with a checkpoint takes" in unfolded(done.stdout)
