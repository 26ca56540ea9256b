"""Failures as users meet them: a process dies, memory or disk runs out, the network or the server goes away, somebody interrupts.

Each ends in the right state with a reason that can be read, nothing is left running, and the next run goes on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qrpo.errors import ConfigError, DataError, EngineError
from storage import StoreUnavailableError
from tasks.retries import may_pass

SLOW_SAMPLING = {
    "completions__engine": {"kind": "transformers", "max_num_seqs": 2},
    "completions__sampling": {"max_tokens": 30},
    "completions__num_ref": 64,
    "completions__samples_per_part": 16,
    "run__part_size": 4,
}


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


@pytest.fixture
def interruptible(
    write_task: Callable[..., Path], start_qrpo: Callable[..., Any], tmp_path: Path, prefect_server: str
) -> Iterator[Any]:
    """`qrpo run` in the middle of sampling, some parts committed."""
    config = write_task(tmp_path / "task", prompts=16, **SLOW_SAMPLING)
    log = tmp_path / "run.log"
    store = tmp_path / "store"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("qrpo"),
                "run",
                config,
                "--store",
                store,
                "--until",
                "completions",
            ],
            env={**os.environ, "PREFECT_API_URL": prefect_server},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 300
    while not list(store.glob("parts/completions/*/*.json")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    yield process, log, store, config
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def newest_run(server: str, name: str) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        body = {"sort": "START_TIME_DESC", "limit": 1, "flows": {"name": {"any_": [name]}}}
        return client.request("POST", "/flow_runs/filter", json=body).json()[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "Cancel in the UI"])
def test_interrupted_run_stops_at_once_and_goes_on_later(
    interruptible: Any, how: str, prefect_server: str, qrpo: Callable[..., Any]
) -> None:
    from prefect.client.orchestration import get_client

    process, log, store, config = interruptible
    children = children_of(process.pid)
    assert children
    if how == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        run = newest_run(prefect_server, "pipeline")
        with get_client(sync_client=True) as client:
            state = {"state": {"type": "CANCELLING"}}
            client.request("POST", "/flow_runs/{id}/set_state", path_params={"id": run["id"]}, json=state)

    code = process.wait(timeout=120)

    assert code == 1, log.read_text()
    assert "interrupted; the parts that were finished are kept" in log.read_text()
    assert "Traceback" not in log.read_text()
    run = newest_run(prefect_server, "pipeline")
    assert run["state_type"] == "CANCELLED"
    assert "goes on from there" in run["state"]["message"]
    deadline = time.monotonic() + 30
    while left := [child for child in children if is_running(child)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    finished = len(list(store.glob("parts/completions/*/*.json")))
    again = qrpo("run", config, "--store", store, "--until", "completions", "--json")
    stage = json.loads(again.stdout)["stages"]["completions"]
    assert stage["parts_cached"] == finished
    assert stage["parts_computed"] > 0


@pytest.mark.slow
def test_engine_that_dies_is_started_again_and_the_run_completes(
    interruptible: Any, prefect_server: str
) -> None:
    process, log, store, _ = interruptible
    engines = [
        pid
        for pid in children_of(process.pid)
        if b"qrpo.serving" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    before = {path.name: path.stat().st_mtime_ns for path in store.glob("parts/completions/*/*.json")}

    os.kill(engines[0], signal.SIGKILL)  # as the system does where memory runs out
    code = process.wait(timeout=400)

    assert code == 0, log.read_text()
    assert newest_run(prefect_server, "completions")["state_type"] == "COMPLETED"
    after = {path.name: path.stat().st_mtime_ns for path in store.glob("parts/completions/*/*.json")}
    assert len(after) > len(before), "it went on"
    assert {name: after[name] for name in before} == before, "finished parts were not touched"


@pytest.mark.slow
def test_full_disk_is_told_with_the_remedy_and_the_next_run_goes_on(
    write_task: Callable[..., Path], tmp_path: Path, prefect_server: str
) -> None:
    config = write_task(tmp_path / "task", prompts=16)
    store = tmp_path / "store"
    store.mkdir()
    # a file system of 256 KiB, seen by this process and its children alone
    mount = 'mount -t tmpfs -o size=256k tmpfs "$1" && head -c 230k /dev/zero > "$1/ballast"'
    run = '"$2" run "$3" --store "$1" --until completions'
    script = f'{mount} && {{ {run}; echo "code $?"; rm "$1/ballast"; {run}; echo "code $?"; }}'
    possible = subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=60)
    if possible.returncode:
        pytest.skip("no rights to mount a small file system here")

    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", store, Path(sys.executable).with_name("qrpo"), config],
        env={**os.environ, "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        timeout=400,
    )

    assert "code 1" in done.stdout.splitlines(), done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert "The disk is full: free space (`qrpo gc` shows what no run needs) and start again." in done.stderr
    assert "code 0" in done.stdout.splitlines(), done.stdout + done.stderr


@pytest.mark.slow
def test_failure_names_its_reason_in_the_state_and_the_log_on_the_terminal(
    write_task: Callable[..., Path], tmp_path: Path, prefect_server: str, qrpo: Callable[..., Any]
) -> None:
    config = write_task(tmp_path / "task", prompts=8)
    (tmp_path / "task" / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n    raise ValueError('no scale')\n"
    )

    result = qrpo("run", config, "--store", tmp_path / "store")

    assert result.exit_code == 1
    assert "no scale" in result.stderr
    log = tmp_path / "store" / "logs" / "tiny" / "run.log"
    assert f"the run's log: {log}" in result.stderr.replace("\n", "")
    assert "prefect" in log.read_text()
    run = newest_run(prefect_server, "rewards")
    assert run["state_type"] == "FAILED"
    assert "no scale" in run["state"]["message"]


@pytest.mark.slow
def test_task_that_hangs_is_timed_out(
    write_task: Callable[..., Path],
    tmp_path: Path,
    prefect_server: str,
    qrpo: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tasks import groups

    config = write_task(tmp_path / "task", prompts=8)
    (tmp_path / "task" / "reward.py").write_text(
        "import time\n\ndef reward(prompts, completions, **columns):\n    time.sleep(3600)\n"
    )
    monkeypatch.setattr(
        groups, "compute_parts", groups.compute_parts.with_options(retries=0)
    )  # no second hour

    result = qrpo("run", config, "--store", tmp_path / "store", "--set", "run.task_timeout=15")

    assert result.exit_code == 1
    assert "15" in result.stderr
    assert newest_run(prefect_server, "rewards")["state_type"] == "FAILED"


@pytest.mark.slow
def test_an_automation_sends_failed_deployments_to_the_notification_block(prefect_server: str) -> None:
    """The automation is made as `qrpo deploy --notify` makes it; that Prefect then sends the message is not shown here."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.orchestration import get_client

    from flows.automations import find_dead_runs, tell_of_failures

    block = CustomWebhookNotificationBlock(
        name="alerts", url="http://127.0.0.1:9/hook", json_data={"text": "{{body}}"}
    )
    block.save("alerts", overwrite=True)
    with get_client(sync_client=True) as client:
        for _ in range(2):  # a second deployment changes them, and adds none
            names = [find_dead_runs(client), tell_of_failures(client, "custom-webhook/alerts")]
        found = [automation for name in names for automation in client.read_automations_by_name(name)]
        with pytest.raises(ConfigError, match="no such block on the server"):
            tell_of_failures(client, "slack-webhook/missing")

    assert [automation.name for automation in found] == names
    assert found[1].actions[0].type == "send-notification"
