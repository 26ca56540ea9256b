"""Failures as users meet them: a process dies, memory or disk runs out, the network or the server goes away, somebody interrupts.

Each ends in the right state with a reason that can be read, nothing is left running, and the next run goes on.
"""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from qrpo.errors import ConfigError, DataError, EngineError
from storage import Store, StoreUnavailableError
from tasks.retries import may_pass


def unavailable(passing: bool) -> StoreUnavailableError:
    error = StoreUnavailableError("the store")
    error.transient = passing
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EngineError("the vllm engine of x was killed by SIGKILL in the middle of its work"), True),
        (EngineError("the engine of x failed: torch.OutOfMemoryError: CUDA out of memory. Its log: y"), True),
        (EngineError("tasks.stages.policy:compute failed: ValueError: a mistake. Its log: y"), False),
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
            wait_for_parts(len(parts_of(store)) + 1, store, process, log)
            if how == "Ctrl-C":
                engine = engine_of(process.pid)
                os.kill(engine, signal.SIGKILL)  # as the system does where memory runs out
                assert not still_there([engine])
                assert engine_of(process.pid) != engine  # by now what the dead one had sent is committed
                seen["before the new engine"] = before = parts_of(store)
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


def engine_of(parent: int) -> int:
    """The process id of a running process's engine, as soon as there is one."""
    deadline = time.monotonic() + 120
    while not (found := [c for c in children_of(parent) if b"qrpo.processes.serving" in command_of(c)]):
        assert command_of(parent), "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


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
    before, after = story["before the new engine"], story["after"]

    assert len(after) > len(before) + 1
    assert {name: after[name] for name in before} == before, "finished parts were not touched"


@pytest.fixture
def score(
    story: dict[str, Any],
    config: Path,
    tmp_path: Path,
    qrpo: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Score the story's completions, in a store of its own unless one is named, by a reward of this source; no task is tried again."""
    from tasks import groups

    monkeypatch.setattr(groups, "compute_parts", groups.compute_parts.with_options(retries=0))
    task = tmp_path / "task"
    shutil.copytree(config.parent, task)
    (task / "config.yaml").write_text(
        config.read_text().replace(str(config.parent / "reward.py"), str(task / "reward.py"))
    )
    shutil.copytree(story["store"], tmp_path / "store")

    def run(source: str, *options: str, store: str | Path = tmp_path / "store") -> Any:
        (task / "reward.py").write_text(source)
        return qrpo("run", task / "config.yaml", "--store", store, "--only", "rewards", "--json", *options)

    return run


@pytest.mark.slow
def test_failure_names_its_reason_in_the_state_and_the_log_on_the_terminal(
    score: Callable[..., Any], prefect_server: str, tmp_path: Path
) -> None:
    result = score("def reward(prompts, completions, **columns):\n    raise ValueError('no scale')\n")

    assert result.exit_code == 1
    assert "no scale" in result.stderr
    log = tmp_path / "store" / "logs" / "tiny" / "run.log"
    assert f"the run's log: {log}" in result.stderr.replace("\n", "")
    assert "prefect" in log.read_text()
    run = newest_run(prefect_server, "rewards")
    assert run["state_type"] == "FAILED"
    assert "no scale" in run["state"]["message"]


@pytest.mark.slow
# by a thread: the signal of pytest's other method is the one that Prefect's time-outs come by
@pytest.mark.timeout(600, method="thread")
def test_task_that_hangs_is_timed_out(score: Callable[..., Any], prefect_server: str) -> None:
    result = score(
        "import time\n\ndef reward(prompts, completions, **columns):\n    time.sleep(3600)\n",
        *("--set", "run.task_timeout=5"),
    )

    assert result.exit_code == 1
    assert "timed out after 5.0 second(s)" in result.stderr
    assert newest_run(prefect_server, "rewards")["state_type"] == "FAILED"


@pytest.fixture
def memory_limit() -> Iterator[Path]:
    """A control group of the kernel whose processes get 100 MB of memory together."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root, f"qrpo-test-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text("100M")
        except OSError:
            continue
        yield group
        deadline = time.monotonic() + 20
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        group.rmdir()
        return
    pytest.skip("no rights to limit memory here")


@pytest.mark.slow
def test_memory_that_runs_out_is_told_and_the_next_run_goes_on(
    story: dict[str, Any],
    config: Path,
    memory_limit: Path,
    tmp_path: Path,
    qrpo: Callable[..., Any],
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tasks import groups

    monkeypatch.setattr(groups, "compute_parts", groups.compute_parts.with_options(retries=0))
    shutil.copytree(story["store"], tmp_path / "store")
    more = ("run", config, "--store", tmp_path / "store", "--only", "completions", "--json")
    more += ("--set", "completions.num_ref=40", "--set", "completions.engine.max_num_seqs=64")

    def squeeze_the_engine() -> None:
        (memory_limit / "cgroup.procs").write_text(str(engine_of(os.getpid())))

    with ThreadPoolExecutor() as pool:
        squeezed = pool.submit(squeeze_the_engine)
        killed = qrpo(*more)
        squeezed.result()
    run = newest_run(prefect_server, "completions")
    again = qrpo(*more)

    assert killed.exit_code == 1
    assert "was killed by SIGKILL (the system does this where memory runs out)" in killed.stderr
    assert run["state_type"] == "FAILED"
    assert "where memory runs out" in run["state"]["message"]
    assert again.exit_code == 0, again.stderr
    stage = json.loads(again.stdout)["stages"]["completions"]
    assert stage["parts_cached"] == len(story["at the end"])
    assert stage["parts_computed"] > 0


class Gate(ThreadingTCPServer):
    """The way to an address: what is on it is passed on while it is open, and cut off where it is shut."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.there = host, port
        self.is_open = True


class _Passage(BaseRequestHandler):
    server: Gate

    def handle(self) -> None:
        if not self.server.is_open:
            return
        with socket.create_connection(self.server.there) as there:
            other = {self.request: there, there: self.request}
            while self.server.is_open:
                for end in select.select(list(other), [], [], 0.05)[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    other[end].sendall(data)


@pytest.fixture
def gate(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The only way to the S3 server."""
    host, _, port = s3_endpoint.removeprefix("http://").partition(":")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAFAILURESTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "failures-test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with Gate(host, int(port)) as gate:
        threading.Thread(target=gate.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.server_address[1]}")
        yield gate
        gate.shutdown()


SLOW = """\
import time


def reward(prompts, completions, **columns):
    time.sleep(0.4)
    return [float(len(said)) for said in completions]
"""


@pytest.mark.slow
def test_network_that_stays_away_is_told_and_one_that_comes_back_is_waited_for(
    score: Callable[..., Any],
    story: dict[str, Any],
    gate: Gate,
    s3_endpoint: str,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import boto3

    from storage import remote

    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    s3.create_bucket(Bucket="failures")
    store = Store("s3://failures/store")
    for path in filter(Path.is_file, story["store"].rglob("*")):
        if path.suffix in (".json", ".parquet"):
            store.write_bytes(path.relative_to(story["store"]).as_posix(), path.read_bytes())

    def scored() -> int:
        listing = s3.list_objects_v2(Bucket="failures", Prefix="store/parts/rewards/")
        return sum(found["Key"].endswith(".json") for found in listing.get("Contents", ()))

    def shut(after: int, seconds: float) -> None:
        while scored() <= after:
            time.sleep(0.05)
        gate.is_open = False
        time.sleep(seconds)
        gate.is_open = True

    with ThreadPoolExecutor() as pool:
        with monkeypatch.context() as patch:
            patch.setattr(remote, "ATTEMPTS", 3)  # as if it stayed away for longer
            away = pool.submit(shut, 0, 6.0)
            failed = score(SLOW, "--set", "run.parts_per_task=12", store=store.url)
            run = newest_run(prefect_server, "rewards")
            away.result()
        kept = scored()
        back = pool.submit(shut, kept, 2.0)
        done = score(SLOW, "--set", "run.parts_per_task=12", store=store.url)
        back.result()

    assert failed.exit_code == 1
    assert "after 3 attempts" in failed.stderr
    assert "s3://failures/store" in failed.stderr
    assert run["state_type"] == "FAILED"
    assert "after 3 attempts" in run["state"]["message"]
    assert done.exit_code == 0, done.stderr
    rewards = json.loads(done.stdout)["stages"]["rewards"]
    assert 0 < kept == rewards["parts_cached"]
    assert rewards["parts_computed"] == len(story["at the end"]) - kept


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

    from flows.service.automations import find_dead_runs, tell_of_failures

    CustomWebhookNotificationBlock(name="alerts", url="http://127.0.0.1:9/hook").save("alerts")
    with get_client(sync_client=True) as client:
        for _ in range(2):  # a second deployment changes them, and adds none
            names = [find_dead_runs(client), tell_of_failures(client, "custom-webhook/alerts")]
        found = [automation for name in names for automation in client.read_automations_by_name(name)]
        with pytest.raises(ConfigError, match="no such block on the server"):
            tell_of_failures(client, "slack-webhook/missing")

    assert [automation.name for automation in found] == names
