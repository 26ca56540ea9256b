"""Training that is killed, told to end or left without disk: what goes on from it is the run that nobody disturbed, bit for bit."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars
import pyarrow as pa
import pytest

from qrpo.training.checkpoints import (
    UNFINISHED,
    commit_checkpoint,
    latest_checkpoint,
    remove_broken_checkpoints,
)
from storage import PartKey, Store
from tasks.stages.shards import TABLE
from tests.support import training

pytestmark = pytest.mark.slow

KILLS = 20
STEPS = 56
SETTINGS = {
    **training.SETTINGS,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 7,
    "warmup_steps": 0.2,
    "save_steps": 2,
}


class Server:
    """The process that forks training runs, see `tests.support.training`."""

    def __init__(self, data, folder):
        self.data, self.folder = data, folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.training"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )

    def _ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, output, full_from=None):
        """Start a run into `output`, or continue it; its process id."""
        paths = {"folder": self.folder, "shards": self.data, "output": output, "reports": f"{output}.jsonl"}
        paths = {name: str(path) for name, path in paths.items()}
        return self._ask({**paths, "settings": SETTINGS, "full_from": full_from})["pid"]

    def wait(self):
        """The exit status of the last run: minus the signal if one ended it."""
        return self._ask("wait")["status"]


@pytest.fixture(scope="module")
def server(folder, make_rows, tmp_path_factory):
    """30 prompts with 2 completions each in two shards, and the server."""
    columns = {"sample_index": [0, 1], "origin": ["offline"] * 2}
    bounds = ("quantile_low", "quantile_high")
    rows = [{**row, **columns, **dict.fromkeys(bounds, row["quantile_reward"])} for row in make_rows(30, 2)]
    data = tmp_path_factory.mktemp("data")
    store = Store(data)
    records = [
        store.commit_part(
            PartKey("shards", "family", f"{first}"),
            pa.Table.from_pylist(rows[first : first + 15], schema=TABLE.schema),
        )
        for first in (0, 15)
    ]
    (data / "records").write_bytes(pickle.dumps(records))
    server = Server(data, folder)
    yield server
    server.process.communicate()


def error_of(output):
    return Path(f"{output}.error").read_text()


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """The folder of an undisturbed run."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    server.start(output)
    assert server.wait() == 0, error_of(output)
    return output


def reports_of(output):
    """Every whole line that any attempt reported."""
    text = Path(f"{output}.jsonl")
    lines = text.read_text().split("\n")[:-1] if text.exists() else []
    return [json.loads(line) for line in lines]


def wait_for(happened):
    deadline = time.monotonic() + 60
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def assert_same(output, expected):
    """The same weights, and the same losses and learning rates in every step, to the bit."""
    weights = [path / "final" / "model.safetensors" for path in (output, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    columns = ("step", "loss", "learning_rate", "grad_norm", "epoch", "log_ratio/mean")
    tables = [
        polars.read_parquet(path / "metrics.parquet").select(columns).drop_nulls("loss")
        for path in (output, expected)
    ]
    assert tables[0]["step"].to_list() == list(range(1, STEPS + 1))
    assert tables[0].equals(tables[1])
    means = [polars.read_parquet(path / "metrics.parquet")["train_loss"] for path in (output, expected)]
    assert means[0].to_list() == means[1].to_list()
    reference = {report["step"]: report for report in reports_of(expected)}
    for report in reports_of(output):  # also of attempts whose steps were lost and repeated
        for name in ("loss", "learning_rate", "grad_norm"):
            assert report[name] == reference[report["step"]][name]


def test_20_kills_at_random_instants_change_nothing(server, uninterrupted, tmp_path, capsys):
    rng = random.Random(time.time_ns())
    output = tmp_path / "run"
    unfinished, killed_at, while_saving = output / UNFINISHED, [], 0
    for number in range(KILLS):
        newest = latest_checkpoint(output)
        reached = 0 if newest is None else int(newest.name.removeprefix("checkpoint-"))
        before = len(reports_of(output))
        pid = server.start(output)
        if number % 2:  # in the middle of writing a checkpoint, or just behind it
            target = reached + rng.choice((2, 4))
            wait_for(lambda target=target: any(unfinished.glob(f"checkpoint-{target}/*")))
            time.sleep(rng.uniform(0, 0.02))
        elif number % 4:  # at some step
            steps = rng.randint(1, 5)
            wait_for(lambda seen=before + steps: len(reports_of(output)) >= seen)
            time.sleep(rng.uniform(0, 0.05))
        else:  # at any time, start-up included
            time.sleep(rng.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL, "it ended before it could be killed"
        while_saving += any(unfinished.glob("checkpoint-*"))
        killed_at.append(reports_of(output)[-1]["step"] if len(reports_of(output)) > before else reached)
    server.start(output)

    assert server.wait() == 0, error_of(output)
    assert_same(output, uninterrupted)
    assert while_saving
    assert not unfinished.exists()
    assert len(list(output.glob("checkpoint-*"))) == 2
    with capsys.disabled():
        sys.stdout.write(
            f"\n{KILLS} kills (-9), {while_saving} in the middle of a checkpoint, after steps "
            f"{', '.join(map(str, killed_at))} of {STEPS}: {len(reports_of(output))} steps computed in all; weights, losses "
            "and learning rates as without them, to the bit\n"
        )


def test_sigterm_saves_at_once_and_the_rest_is_the_same(server, uninterrupted, tmp_path):
    output = tmp_path / "run"
    pid = server.start(output)
    assert wait_for(lambda: len(reports_of(output)) >= 3)
    os.kill(pid, signal.SIGTERM)

    assert server.wait() == 1
    error = error_of(output)
    step = reports_of(output)[-1]["step"]
    assert f"stopped by SIGTERM after step {step} of {STEPS}" in error
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{step}"
    assert not (output / "final").exists()

    server.start(output)
    assert server.wait() == 0
    assert reports_of(output)[-1]["step"] == STEPS
    assert [report["step"] for report in reports_of(output)] == list(range(1, STEPS + 1)), "nothing was lost"
    assert_same(output, uninterrupted)


def test_a_full_disk_stops_cleanly_with_the_older_checkpoint(server, uninterrupted, tmp_path):
    output = tmp_path / "run"
    server.start(output, full_from=5)  # from then on no file may grow past 20 kB

    assert server.wait() == 1
    error = error_of(output)
    assert error.startswith("TrainingError: the checkpoint of step 6 cannot be written")
    assert "checkpoint-4 is complete. Free disk space there" in error
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-2", "checkpoint-4"]

    server.start(output)
    assert server.wait() == 0
    assert_same(output, uninterrupted)


def write_checkpoint(folder, step):
    path = folder / UNFINISHED / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"x" * 100)


def test_the_newest_checkpoints_are_kept_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        write_checkpoint(tmp_path, step)
        commit_checkpoint(tmp_path, step, keep=2, keep_also=tmp_path / "checkpoint-4")

    assert sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*")) == [4, 8, 10]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_what_was_not_named_is_never_used(tmp_path):
    write_checkpoint(tmp_path, 2)
    commit_checkpoint(tmp_path, 2, keep=1)
    write_checkpoint(tmp_path, 4)

    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    remove_broken_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
