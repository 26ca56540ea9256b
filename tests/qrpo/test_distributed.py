"""Training on two processes (gloo, CPU): the losses and weights of one process on the same global batches."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from safetensors.torch import load_file

from qrpo.errors import EngineError, TrainingError
from qrpo.processes.child import Child
from qrpo.training.ranks import stream_ranks
from tests.support import training

pytestmark = pytest.mark.slow

TARGETS = training.__file__
SETTINGS = {
    **training.SETTINGS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 2,
    "warmup_steps": 0.2,
    "token_budget": 64,
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def rows(make_rows):
    """13 prompts: the last step of an epoch has one, so one of two processes has none."""
    return make_rows(13, 3)


@pytest.fixture(scope="module")
def rows_file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows"
    path.write_bytes(pickle.dumps(rows))
    return path


@pytest.fixture(scope="module")
def alone(folder, rows, tmp_path_factory):
    """The output of one process."""
    output = tmp_path_factory.mktemp("alone")
    training.train(folder, rows, output, **SETTINGS)
    return output


def assert_same(output, alone):
    """Up to the rounding of sums in another order."""
    ours, theirs = (
        polars.read_parquet(path / "metrics.parquet").drop_nulls("loss") for path in (output, alone)
    )
    assert ours["step"].to_list() == theirs["step"].to_list() == list(range(1, 9))
    for name in ("loss", "learning_rate", "grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
    weights = load_file(output / "final" / "model.safetensors")
    for name, weight in load_file(alone / "final" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)


def test_torchrun_with_two_processes_is_one_process_on_the_same_batches(folder, rows_file, alone, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import json, pickle, sys
        from pathlib import Path
        from qrpo.training.settings import PolicyConfig
        from qrpo.training.runs import train_policy
        folder, rows, settings, output = sys.argv[1:]
        config = PolicyConfig(**json.loads(settings))
        train_policy(folder, pickle.loads(Path(rows).read_bytes()), config, output)
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(folder), str(rows_file), json.dumps(SETTINGS), str(tmp_path / "run")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "run", alone)


def test_two_processes_told_to_end_go_on_as_one(folder, rows, rows_file, alone, tmp_path):
    """A SIGTERM to one process stops both after the same step; another number of processes goes on with the same rows."""
    output, log = tmp_path / "run", tmp_path / "log"
    ranks = stream_ranks(
        f"{TARGETS}:train_and_yield", folder, rows_file, output, SETTINGS, 5, processes=2, log=log
    )
    with pytest.raises(TrainingError, match="stopped by SIGTERM after step 6 of 8"):
        list(ranks)
    training.train(folder, rows, output, **SETTINGS)

    assert_same(output, alone)


def test_fsdp_on_two_processes_is_one_process_and_resumes(folder, rows_file, alone, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    settings = {**SETTINGS, "fsdp": True}
    target, arguments = f"{TARGETS}:train_and_yield", (folder, rows_file, output, settings)
    with pytest.raises(TrainingError, match="stopped by SIGTERM after step 3 of 8"):
        list(stream_ranks(target, *arguments, 2, processes=2, log=log))
    assert (output / "checkpoint-3" / "pytorch_model_fsdp.bin").exists(), "the model was sharded"
    reports = list(stream_ranks(target, *arguments, processes=2, log=log))

    assert [report["step"] for report in reports] == [4, 5, 6, 7, 8]
    assert_same(output, alone)


def test_a_rank_s_failure_is_raised_as_what_it_is(folder, rows, tmp_path):
    bad = [dict(row) for row in rows]
    bad[7]["quantile_reward"] = np.array([0.1, np.nan, 0.3], dtype=np.float32)
    (tmp_path / "rows").write_bytes(pickle.dumps(bad))

    arguments = (folder, tmp_path / "rows", tmp_path / "run", SETTINGS)
    ranks = stream_ranks(f"{TARGETS}:train_and_yield", *arguments, processes=2, log=tmp_path / "log")
    with pytest.raises(TrainingError, match=r"not finite for these prompts: prompt-7\."):
        list(ranks)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pids):
    deadline = time.monotonic() + 30
    while not all(map(is_gone, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_killed_rank_ends_all(tmp_path):
    ranks = stream_ranks(f"{TARGETS}:leave_pid_and_wait", tmp_path, processes=2)
    next(ranks)
    while not (tmp_path / "1").exists() or not (tmp_path / "1").read_text():
        time.sleep(0.02)
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    os.kill(pids[1], 9)

    with pytest.raises(EngineError, match="rank 1 of 2, was killed by SIGKILL"):
        list(ranks)
    assert wait_until_gone(pids)


def test_kill_9_of_the_parent_leaves_no_rank(tmp_path):
    """As in the pipeline: a process that has a child for the stage, which has one for each rank."""
    script = (
        "import time\nfrom pathlib import Path\nfrom qrpo.processes.child import Child\n"
        f"child = Child('qrpo.processes.serving:GeneratorFunction', {f'{TARGETS}:start_ranks'!r})\n"
        f"items = child.stream('run', 2, Path({str(tmp_path)!r}))\n"
        "print(next(items), flush=True)\ntime.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        stage = int(parent.stdout.readline())
        while not (tmp_path / "1").exists() or not (tmp_path / "1").read_text():
            time.sleep(0.02)
        pids = [stage, *(int((tmp_path / rank).read_text()) for rank in "01")]
        assert not any(map(is_gone, pids))
        parent.kill()
        parent.wait()
        assert wait_until_gone(pids)


def test_closing_early_leaves_no_rank(tmp_path):
    items = Child("qrpo.processes.serving:GeneratorFunction", f"{TARGETS}:start_ranks").stream(
        "run", 2, tmp_path
    )
    next(items)
    items.close()
    assert wait_until_gone([int(path.read_text()) for path in tmp_path.iterdir() if path.read_text()])
