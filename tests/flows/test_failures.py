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
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from qrpo.errors import ConfigError, DataError, EngineError
from storage import Store, StoreUnavailableError
from tasks.retries import is_transient
from tests.support.flows import QRPO, clean_environment, invoke, new_bucket, parts_of, run_json
from tests.support.processes import descendants, engine_of, eventually, free_port, running, survivors


def unavailable(passing: bool) -> StoreUnavailableError:
    error = StoreUnavailableError("the store")
    error.transient = passing
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EngineError("the vllm engine of x was killed by SIGKILL", transient=True), True),
        (EngineError("reward x exited with code 3 during a call. Its last output: out of memory"), False),
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
def test_only_transient_errors_are_retried(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


IN_SHELL = ("bash", "-c")


@pytest.mark.parametrize(
    ("prefix", "arguments", "line"),
    [
        (
            ("unshare", "-U", "--map-user=54321", "env", "-u", "HOME"),
            ("ls",),
            "the user with id 54321 has no home folder: set HOME",
        ),
        (
            (*IN_SHELL, 'ulimit -v 3000000; exec "$@"', "-"),
            ("run", "config.yaml"),
            "(ulimit -v) is 2.9 GiB, expected at least 4",
        ),
        ((*IN_SHELL, 'exec "$@" 2>/dev/full', "-"), ("run", "missing.yaml"), ""),
    ],
)
def test_environment_that_no_run_can_use_is_one_line(
    prefix: tuple[str, ...], arguments: tuple[str, ...], line: str, write_task: Any, tmp_path: Path
) -> None:
    write_task(tmp_path)
    environment = clean_environment(QRPO_STORE=str(tmp_path / "store"))
    command = [*prefix, QRPO, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if "unshare failed" in done.stderr:
        pytest.skip("no rights to make a user here")

    assert done.returncode == 2, done.stdout + done.stderr
    assert line in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path]) -> Path:
    """Many small parts, slowly sampled, so that there is a middle to be interrupted in."""
    return write_task(
        tmp_path_factory.mktemp("failures") / "task",
        prompts=8,
        completions__engine={"kind": "transformers", "max_num_seqs": 1},
        completions__sampling={"max_tokens": 30},
        completions__num_ref=32,
        completions__samples_per_part=8,
        run__part_size=2,
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, config: Path, prefect_server: str) -> dict[str, Any]:
    """Sampling in four runs on one store: its engine is killed and Ctrl-C ends it; it is cancelled in the UI; its engine is killed
    and not started again; it ends well."""
    folder = tmp_path_factory.mktemp("story")
    store = folder / "store"
    seen: dict[str, Any] = {"store": store, "ended": {}}
    options = ("run", config, "--store", store, "--until", "completions")
    for how in ("Ctrl-C", "Cancel in the UI"):
        log = folder / f"{how}.log"
        environment = {**os.environ, "PREFECT_API_URL": prefect_server}
        with running([QRPO, *options], log, env=environment) as process:
            wait_for_parts(len(parts_of(store)) + 1, store, process, log)
            if how == "Ctrl-C":
                engine = engine_of(process.pid)
                os.kill(engine.pid, signal.SIGKILL)  # as the system does where memory runs out
                assert not survivors([engine])
                assert engine_of(process.pid) != engine  # by now what the dead one had sent is committed
                seen["before the new engine"] = before = parts_of(store)
                seen["after"] = wait_for_parts(len(before) + 2, store, process, log)
            family = descendants(process.pid)
            assert family
            process.send_signal(signal.SIGINT) if how == "Ctrl-C" else cancel(newest_run("pipeline")["id"])
            code = process.wait(timeout=120)
        run = newest_run("pipeline")
        seen["ended"][how] = (code, log.read_text(), run["state"], survivors(family, seconds=30))
    options += ("--set", "completions.engine.max_num_seqs=64")
    seen["finished"] = parts_of(store)
    seen["killed"] = killed(options)
    seen["kept"] = parts_of(store)
    seen["summary"] = run_json(*options)["stages"]["completions"]
    seen["at the end"] = parts_of(store)
    return seen


def wait_for_parts(number: int, store: Path, process: "subprocess.Popen[bytes]", log: Path) -> dict[str, int]:
    """The parts, once there are `number`."""
    enough = lambda: parts if len(parts := parts_of(store)) >= number else None  # noqa: E731
    found = eventually(enough, f"{number} parts", every=0.02, log=log, process=process)
    assert found is not None
    return found


def killed(options: tuple[Any, ...]) -> tuple[Any, Any]:
    """The result and the flow run of a run in this process whose engine is killed and not started again."""

    def kill_the_engine() -> None:
        os.kill(engine_of(os.getpid()).pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        without_retries(patch)
        killing = pool.submit(kill_the_engine)
        result = invoke(*options)
        killing.result()
    return result, newest_run("completions")


def without_retries(patch: pytest.MonkeyPatch) -> None:
    from tasks import groups

    patch.setattr(groups, "compute_parts", groups.compute_parts.with_options(retries=0))


def newest_run(name: str) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        body = {"sort": "START_TIME_DESC", "limit": 1, "flows": {"name": {"any_": [name]}}}
        return client.request("POST", "/flow_runs/filter", json=body).json()[0]


def cancel(run_id: Any) -> None:
    """What the button in the UI does."""
    from prefect.client.orchestration import get_client

    place = {"id": str(run_id)}
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
def test_run_goes_on_with_a_new_engine_and_from_what_interrupted_ones_finished(story: dict[str, Any]) -> None:
    kept, end = story["kept"], story["at the end"]

    assert len(story["after"]) > len(story["before the new engine"]) + 1
    assert story["summary"]["parts_cached"] == len(kept)
    assert story["summary"]["parts_computed"] == len(end) - len(kept) > 0
    for before in (story["before the new engine"], story["finished"], kept):
        assert {name: end[name] for name in before} == before, "finished parts were not touched"


@pytest.mark.slow
def test_memory_that_runs_out_is_told(story: dict[str, Any]) -> None:
    result, run = story["killed"]

    assert result.exit_code == 1
    assert "was killed by SIGKILL (the system does this where memory runs out)" in result.stderr
    assert run["state_type"] == "FAILED"
    assert "where memory runs out" in run["state"]["message"]


@pytest.fixture
def score(
    story: dict[str, Any], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Score the story's completions, in a copy of its store unless one is named, by a reward of this source, without retries."""
    without_retries(monkeypatch)
    shutil.copytree(story["store"], tmp_path / "store")
    reward = tmp_path / "reward.py"

    def run(source: str, *options: str, store: str | Path = tmp_path / "store") -> Any:
        reward.write_text(source)
        options += ("--only", "rewards", "--set", f"rewards.0.function={reward}:reward", "--json")
        return invoke("run", config, "--store", store, *options)

    return run


ONCE = """\
from pathlib import Path


def reward(prompts, completions, **columns):
    called = Path(__file__).with_name("called")
    if called.exists():
        {}
    called.touch()  # by the check before the run
    return [1.0 for _ in completions]
"""


@pytest.mark.slow
def test_failure_names_its_reason_in_the_state_and_the_log_on_the_terminal(
    score: Callable[..., Any], tmp_path: Path
) -> None:
    result = score(ONCE.format("raise ValueError('no scale')"))

    assert result.exit_code == 1
    assert "no scale" in result.stderr
    log = tmp_path / "store" / "logs" / "tiny" / "run.log"
    assert f"the run's log: {log}" in result.stderr.replace("\n", "")
    assert "prefect" in log.read_text()
    run = newest_run("rewards")
    assert run["state_type"] == "FAILED"
    assert "no scale" in run["state"]["message"]


@pytest.mark.slow
# by a thread: the signal of pytest's other method is the one that Prefect's time-outs come by
@pytest.mark.timeout(600, method="thread")
def test_task_that_hangs_is_timed_out(score: Callable[..., Any]) -> None:
    result = score(ONCE.format("__import__('time').sleep(3600)"), "--set", "run.task_timeout=5")

    assert result.exit_code == 1
    assert "timed out after 5.0 second(s)" in result.stderr
    assert newest_run("rewards")["state_type"] == "FAILED"


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
    """The only way to a bucket on the S3 server."""
    host, _, port = s3_endpoint.removeprefix("http://").partition(":")
    with new_bucket(s3_endpoint, "failures"), Gate(host, int(port)) as gate:
        threading.Thread(target=gate.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.server_address[1]}")
        yield gate
        gate.shutdown()


SLOW = """\
import time


def reward(prompts, completions, **columns):
    time.sleep(0.2)
    return [float(len(said)) for said in completions]
"""


@pytest.mark.slow
def test_network_that_stays_away_is_told_and_one_that_comes_back_is_waited_for(
    score: Callable[..., Any],
    story: dict[str, Any],
    gate: Gate,
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import boto3

    from storage import remote

    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    store = Store("s3://failures/store")
    for path in filter(Path.is_file, story["store"].rglob("*")):
        if path.suffix in (".json", ".parquet"):
            store.write_bytes(path.relative_to(story["store"]).as_posix(), path.read_bytes())

    def scored() -> int:
        listing = s3.list_objects_v2(Bucket="failures", Prefix="store/parts/rewards/")
        return sum(found["Key"].endswith(".json") for found in listing.get("Contents", ()))

    def shut(after: int, seconds: float) -> None:
        eventually(lambda: scored() > after, "another part")
        gate.is_open = False
        time.sleep(seconds)
        gate.is_open = True

    with ThreadPoolExecutor() as pool:
        with monkeypatch.context() as patch:
            patch.setattr(remote, "ATTEMPTS", 3)  # as if it stayed away for longer
            away = pool.submit(shut, 0, 6.0)
            failed = score(SLOW, "--set", "run.parts_per_task=12", store=store.url)
            run = newest_run("rewards")
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


@pytest.fixture
def service(tmp_path: Path) -> Any:
    """A Prefect server on one port and database, which can be killed and started again."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = tmp_path / "server.log"
    home = clean_environment(PREFECT_HOME=str(tmp_path / "prefect"), PREFECT_API_URL=url)
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", port]

    @contextmanager
    def start() -> Iterator["subprocess.Popen[bytes]"]:
        with running(command, log, env=home) as server:
            eventually(lambda: answers(f"{url}/health"), "the server's start", every=0.2, log=log)
            yield server

    return SimpleNamespace(start=start, url=url, port=port, environment=home)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


class Failing(BaseHTTPRequestHandler):
    """A server that answers everything with an internal error."""

    def answer(self) -> None:
        self.send_error(500)

    do_GET = do_POST = do_PATCH = do_PUT = answer

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.slow
def test_server_that_is_killed_and_fails_costs_the_view_of_what_began_meanwhile_and_nothing_else(
    write_task: Callable[..., Path], tmp_path: Path, service: Any
) -> None:
    config = write_task(tmp_path / "task", prompts=16, run__part_size=1, run__parts_per_task=1)
    (config.parent / "reward.py").write_text(SLOW)
    store, log = tmp_path / "store", tmp_path / "log"
    environment = {**service.environment, "PREFECT_CLIENT_MAX_RETRIES": "1"}  # as if it were away for longer
    command = [QRPO, "run", config, "--store", store, "--until", "rewards", "--json"]

    def scored(number: int) -> None:
        enough = lambda: len(parts_of(store, "rewards")) >= number  # noqa: E731
        eventually(enough, f"{number} scored parts", log=log, process=run)

    with ExitStack() as stack:
        server = stack.enter_context(service.start())
        run = stack.enter_context(running(command, log, env=environment))
        eventually(lambda: parts_of(store), "the first part", log=log, process=run)
        os.killpg(server.pid, signal.SIGKILL)  # tasks of `completions` begin and end, and `rewards` begins
        scored(2)
        with ThreadingHTTPServer(("127.0.0.1", service.port), Failing) as failing:
            threading.Thread(target=failing.serve_forever, daemon=True).start()
            scored(6)
            failing.shutdown()
        stack.enter_context(service.start())
        assert run.wait(timeout=300) == 0, log.read_text()
        found = httpx.post(f"{service.url}/flow_runs/filter", json={}).json()

    summary = json.loads(log.read_text().splitlines()[-1])
    assert summary["stages"]["rewards"]["parts_computed"] == summary["stages"]["rewards"]["rows"] / 2 > 6
    assert "completions goes on without Prefect's UI" in log.read_text()
    assert "rewards goes on without Prefect's UI" in log.read_text()
    states = {one["name"].split()[1]: one["state_name"] for one in found}
    assert states == dict.fromkeys(("prompts", "reference", "completions"), "Completed")
    assert [one["name"] for one in found if "prompts to rewards" in one["name"]]


@pytest.mark.slow
def test_run_that_is_cancelled_as_it_completes_ends_completed(prefect_server: str) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    from flows.service.flow_runs import call_flow, report_ends

    seen: list[Any] = []

    @flow(validate_parameters=False)
    def late(config: Any) -> str:
        context = FlowRunContext.get()
        assert context is not None
        seen.append(context.flow_run.id)
        cancel(seen[0])
        return "done"

    assert call_flow(late, SimpleNamespace(name="tiny")) == "done"
    report_ends(patience=0.0)

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(seen[0])
    assert run.state_name == "Completed"
    assert run.tags == ["run:tiny"]


@pytest.mark.slow
def test_server_that_was_never_there_costs_the_view(
    write_task: Callable[..., Path], tmp_path: Path, qrpo_process: Callable[..., Any]
) -> None:
    config = write_task(tmp_path / "task")
    url = f"http://127.0.0.1:{free_port()}/api"
    options = ("--store", tmp_path / "store", "--until", "rewards", "--json")
    done = qrpo_process("run", config, *options, PREFECT_API_URL=url)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"]["rewards"]["parts_computed"] > 1
    assert done.stderr.count("goes on without Prefect's UI") == 1
    assert f"the server at {url} (PREFECT_API_URL) failed" in done.stderr
    assert "Traceback" not in done.stderr


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

    from flows.service.automations import mark_silent_runs, notify_of_failures

    CustomWebhookNotificationBlock(name="alerts", url="http://127.0.0.1:9/hook").save("alerts")
    with get_client(sync_client=True) as client:
        for _ in range(2):  # a second deployment changes them, and adds none
            names = [mark_silent_runs(client), notify_of_failures(client, "custom-webhook/alerts")]
        found = [automation for name in names for automation in client.read_automations_by_name(name)]
        with pytest.raises(ConfigError, match="no such block on the server"):
            notify_of_failures(client, "slack-webhook/missing")

    assert [automation.name for automation in found] == names
