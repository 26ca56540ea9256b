"""A stage spread over two worker processes, the store on an S3 server: the same bytes as a local run, whoever is killed."""

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

from storage import Store

pytestmark = pytest.mark.slow

RUNNERS = ("process", "dask", "ray")


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str) -> Iterator[str]:
    """A bucket of its own on the S3 server, which the environment reaches meanwhile; its URL."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIARUNNERSTEST")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "runners-test-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="runners")
        yield "s3://runners"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path]) -> Path:
    """Many small parts, slowly sampled, so that there is a middle to be killed in."""
    return write_task(
        tmp_path_factory.mktemp("runners") / "task",
        prompts=32,
        completions__engine={"kind": "transformers", "max_num_seqs": 4},
        completions__sampling={"max_tokens": 24},
        completions__samples_per_part=4,
        run__part_size=2,
        run__parts_per_task=2,
    )


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, config: Path, prefect_server: str
) -> dict[str, tuple[str, str]]:
    """Fingerprint -> digests of a run in one process, on a store in a folder."""
    folder = tmp_path_factory.mktemp("alone")
    process = start(folder / "log", prefect_server, config, folder / "store", "local")
    assert process.wait(timeout=400) == 0, (folder / "log").read_text()
    return digests(Store(folder / "store"))


@pytest.mark.parametrize("runner", RUNNERS)
def test_spread_run_survives_both_kills_and_gives_the_bytes_of_a_run_alone(
    runner: str,
    bucket: str,
    config: Path,
    alone: dict[str, tuple[str, str]],
    prefect_server: str,
    tmp_path: Path,
):
    store = Store(f"{bucket}/{runner}")
    driver = start(tmp_path / "first.log", prefect_server, config, store.url, runner)
    wait_for(lambda: committed(store) > 0, driver, tmp_path / "first.log")
    started = descendants(driver.pid)
    driver.kill()
    driver.wait()
    assert len(workers_of(started)) > 1, started
    assert gone(started), living(started)
    kept = committed(store)
    assert 0 < kept < len(alone)

    driver = start(tmp_path / "second.log", prefect_server, config, store.url, runner)
    wait_for(lambda: committed(store) > kept, driver, tmp_path / "second.log")
    started = descendants(driver.pid)
    os.kill(workers_of(started)[0], signal.SIGKILL)
    code = driver.wait(timeout=400)

    assert code == 0, (tmp_path / "second.log").read_text()
    assert gone(started), living(started)
    assert digests(store) == alone
    summary = json.loads((tmp_path / "second.log").read_text().splitlines()[-1])
    assert summary["stages"]["completions"]["parts_cached"] == kept
    assert not store.list("leases/parts")


def start(log: Path, server: str, config: Path, store: Any, runner: str) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QRPO_")}
    arguments = ["run", config, "--store", store, "--until", "completions", "--json"]
    arguments += ["--set", f"run.runner={runner}", "--set", "run.workers=2", "--set", "run.lease_ttl=3"]
    with log.open("wb") as output:
        return subprocess.Popen(
            [Path(sys.executable).with_name("qrpo"), *map(str, arguments)],
            env={**environment, "PREFECT_API_URL": server},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def committed(store: Store) -> int:
    return sum(key.endswith(".json") for key in store.list("parts/completions"))


def digests(store: Store) -> dict[str, tuple[str, str]]:
    """What every part was asked to be and came to be: fingerprint -> (family, sha256 of its rows)."""
    records = [json.loads(store.read_bytes(key)) for key in store.list("parts") if key.endswith(".json")]
    return {record["fingerprint"]: (record["family"], record["files"][0][3]) for record in records}


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"it ended before it could be killed:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def descendants(root: int) -> dict[int, tuple[int, str, str]]:
    """Every process below one: id -> (parent, when it started, command line)."""
    seen: dict[int, tuple[int, str, str]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (status := status_of(int(folder.name))):
            seen[int(folder.name)] = status
    below = {root}
    while more := {process for process, (parent, *_) in seen.items() if parent in below} - below:
        below |= more
    return {process: seen[process] for process in below - {root} if process in seen}


def status_of(process: int) -> tuple[int, str, str] | None:
    """(parent, start time, command line) of a living process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19], command)


def workers_of(processes: dict[int, tuple[int, str, str]]) -> list[int]:
    """Those that have started an engine."""
    return sorted({parent for parent, _, command in processes.values() if "qrpo.serving" in command})


def living(processes: dict[int, tuple[int, str, str]]) -> dict[int, str]:
    now = {process: status_of(process) for process in processes}
    return {
        process: was[2] for process, was in processes.items() if (is_ := now[process]) and is_[1] == was[1]
    }


def gone(processes: dict[int, tuple[int, str, str]]) -> bool:
    """Whether all of them have ended, within a minute."""
    deadline = time.monotonic() + 60
    while living(processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not living(processes)
