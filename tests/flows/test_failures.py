"""Failures as users meet them: a process dies, memory or disk runs out, the network or the server goes away, somebody interrupts.

Each ends in the right state with a reason that can be read, nothing is left running, and the next run goes on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from qrpo.errors import ConfigError, DataError, EngineError
from storage import StoreUnavailableError
from tasks.retries import may_pass


def unavailable(passing: bool) -> StoreUnavailableError:
    error = StoreUnavailableError("the store")
    error.may_pass = passing
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EngineError("the vllm engine of x was killed by SIGKILL in the middle of its work"), True),
        (EngineError("the engine of x failed: torch.OutOfMemoryError: CUDA out of memory. Its log: y"), True),
        (EngineError("tasks.policy:compute failed: ValueError: a mistake. Its log: y"), False),
        (unavailable(passing=True), True),
        (unavailable(passing=False), False),
        (MemoryError(), True),
        (ConnectionResetError(), True),
        (ConfigError("policy.beta: wrong"), False),
        (DataError("too many rejects"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, expected: bool) -> None:
    assert may_pass(error) is expected


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path]) -> Path:
    """Many small parts, slowly sampled, so that there is a middle to be interrupted in."""
    return write_task(
        tmp_path_factory.mktemp("failures") / "task",
        prompts=16,
        completions__engine={"kind": "transformers", "max_num_seqs": 2},
        completions__sampling={"max_tokens": 30},
        completions__num_ref=32,
        completions__samples_per_part=8,
        run__part_size=2,
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, config: Path, prefect_server: str) -> dict[str, Any]:
    """Sampling whose engine is killed and that is then ended by Ctrl-C, goes on and is cancelled in the UI, and goes on to its end."""
    folder = tmp_path_factory.mktemp("story")
    store = folder / "store"
    seen: dict[str, Any] = {"store": store, "ended": {}}
    for how in ("Ctrl-C", "Cancel in the UI"):
        log = folder / f"{how}.log"
        process = start(log, prefect_server, config, store)
        try:
            before = wait_for_parts(len(parts_of(store)) + 1, store, process, log)
            if how == "Ctrl-C":
                [engine] = [
                    child for child in children_of(process.pid) if b"qrpo.serving" in command_of(child)
                ]
                os.kill(engine, signal.SIGKILL)  # as the system does where memory runs out
                seen["before the engine died"] = before
                seen["after"] = wait_for_parts(len(before) + 2, store, process, log)
            family = children_of(process.pid)
            assert family
            if how == "Ctrl-C":
                process.send_signal(signal.SIGINT)
            else:
                cancel_in_the_ui(prefect_server)
            code = process.wait(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        run = newest_run(prefect_server, "pipeline")
        seen["ended"][how] = (code, log.read_text(), run["state"], still_there(family))
    seen["finished"] = parts_of(store)
    options = ("--until", "completions", "--set", "completions.engine.max_num_seqs=64", "--json")
    done = CliRunner().invoke(app, ["run", str(config), "--store", str(store), *options])
    assert done.exit_code == 0, done.stderr
    seen["summary"] = json.loads(done.stdout)["stages"]["completions"]
    seen["at the end"] = parts_of(store)
    return seen


def start(log: Path, server: str, config: Path, store: Path) -> "subprocess.Popen[bytes]":
    command = [
        Path(sys.executable).with_name("qrpo"),
        "run",
        config,
        "--store",
        store,
        "--until",
        "completions",
    ]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, "PREFECT_API_URL": server},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def parts_of(store: Path) -> dict[str, int]:
    """The records of committed completions, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in store.glob("parts/completions/*/*.json")}


def wait_for_parts(number: int, store: Path, process: "subprocess.Popen[bytes]", log: Path) -> dict[str, int]:
    """The parts, once there are so many."""
    deadline = time.monotonic() + 300
    while len(parts := parts_of(store)) < number:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    return parts


def children_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def still_there(processes: list[int]) -> list[bytes]:
    """The command lines of those that have not ended after half a minute; a zombie has none."""
    deadline = time.monotonic() + 30
    while (left := list(filter(None, map(command_of, processes)))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def newest_run(server: str, name: str) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        body = {"sort": "START_TIME_DESC", "limit": 1, "flows": {"name": {"any_": [name]}}}
        return client.request("POST", "/flow_runs/filter", json=body).json()[0]


def cancel_in_the_ui(server: str) -> None:
    from prefect.client.orchestration import get_client

    place = {"id": newest_run(server, "pipeline")["id"]}
    with get_client(sync_client=True) as client:
        state = {"state": {"type": "CANCELLING"}}
        client.request("POST", "/flow_runs/{id}/set_state", path_params=place, json=state)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "Cancel in the UI"])
def test_interrupted_run_stops_at_once_and_leaves_nothing_behind(story: dict[str, Any], how: str) -> None:
    code, log, state, left = story["ended"][how]

    assert code == 1, log
    assert "interrupted; the parts that were finished are kept" in log
    assert "Traceback" not in log
    assert state["type"] == "CANCELLED"
    assert "goes on from there" in state["message"]
    assert not left


@pytest.mark.slow
def test_next_run_goes_on_from_what_interrupted_ones_finished(story: dict[str, Any]) -> None:
    finished, end = story["finished"], story["at the end"]

    assert story["summary"]["parts_cached"] == len(finished)
    assert story["summary"]["parts_computed"] == len(end) - len(finished) > 0
    assert {name: end[name] for name in finished} == finished, "finished parts were not touched"


@pytest.mark.slow
def test_engine_that_dies_is_started_again_and_the_run_goes_on(story: dict[str, Any]) -> None:
    before, after = story["before the engine died"], story["after"]

    assert len(after) > len(before) + 1
    assert {name: after[name] for name in before} == before, "finished parts were not touched"


@pytest.fixture
def reward_failure(
    story: dict[str, Any], config: Path, tmp_path: Path, qrpo: Callable[..., Any]
) -> Callable[..., tuple[Any, Path]]:
    """Score the story's completions by a reward of this source: the command's result, and the store."""
    store = tmp_path / "store"
    shutil.copytree(story["store"], store)

    def score(source: str, *options: str) -> tuple[Any, Path]:
        path = config.parent / "reward.py"
        before = path.read_text()
        path.write_text(source)
        try:
            return qrpo("run", config, "--store", store, "--only", "rewards", *options), store
        finally:
            path.write_text(before)

    return score


@pytest.mark.slow
def test_failure_names_its_reason_in_the_state_and_the_log_on_the_terminal(
    reward_failure: Callable[..., tuple[Any, Path]], prefect_server: str
) -> None:
    result, store = reward_failure(
        "def reward(prompts, completions, **columns):\n    raise ValueError('no scale')\n"
    )

    assert result.exit_code == 1
    assert "no scale" in result.stderr
    log = store / "logs" / "tiny" / "run.log"
    assert f"the run's log: {log}" in result.stderr.replace("\n", "")
    assert "prefect" in log.read_text()
    run = newest_run(prefect_server, "rewards")
    assert run["state_type"] == "FAILED"
    assert "no scale" in run["state"]["message"]


@pytest.mark.slow
def test_task_that_hangs_is_timed_out(
    reward_failure: Callable[..., tuple[Any, Path]], prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import groups

    once = groups.compute_parts.with_options(retries=0)  # no second hour
    monkeypatch.setattr(groups, "compute_parts", once)

    result, _ = reward_failure(
        "import time\n\ndef reward(prompts, completions, **columns):\n    time.sleep(3600)\n",
        *("--set", "run.task_timeout=5"),
    )

    assert result.exit_code == 1
    assert "5" in result.stderr
    assert newest_run(prefect_server, "rewards")["state_type"] == "FAILED"


TWICE_ON_A_SMALL_DISK = """\
import subprocess, sys
from pathlib import Path
from typer.testing import CliRunner
from flows.cli import app

store, config = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", store], check=True)
ballast = Path(store, "ballast")
ballast.write_bytes(bytes(230 * 1024))
for attempt in range(2):
    done = CliRunner().invoke(app, ["run", config, "--store", store, "--until", "completions"])
    print("code", done.exit_code)
    print(done.stderr, file=sys.stderr)
    ballast.unlink(missing_ok=True)
"""


@pytest.mark.slow
def test_full_disk_is_told_with_the_remedy_and_the_next_run_goes_on(
    write_task: Callable[..., Path], tmp_path: Path, prefect_server: str
) -> None:
    possible = subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=60)
    if possible.returncode:
        pytest.skip("no rights to mount a small file system here")
    config = write_task(tmp_path / "task", prompts=16)
    store = tmp_path / "store"
    store.mkdir()

    done = subprocess.run(  # a file system of 256 KiB, seen by this process and its children alone
        ["unshare", "-m", sys.executable, "-c", TWICE_ON_A_SMALL_DISK, store, config],
        env={**os.environ, "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        timeout=400,
    )

    assert done.stdout.splitlines() == ["code 1", "code 0"], done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert "The disk is full: free space (`qrpo gc` shows what no run needs) and start again." in done.stderr


@pytest.mark.slow
def test_automations_are_made_once_and_need_a_block_that_is_there(prefect_server: str) -> None:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.orchestration import get_client

    from flows.automations import find_dead_runs, tell_of_failures

    CustomWebhookNotificationBlock(name="alerts", url="http://127.0.0.1:9/hook").save("alerts")
    with get_client(sync_client=True) as client:
        for _ in range(2):  # a second deployment changes them, and adds none
            names = [find_dead_runs(client), tell_of_failures(client, "custom-webhook/alerts")]
        found = [automation for name in names for automation in client.read_automations_by_name(name)]
        with pytest.raises(ConfigError, match="no such block on the server"):
            tell_of_failures(client, "slack-webhook/missing")

    assert [automation.name for automation in found] == names
