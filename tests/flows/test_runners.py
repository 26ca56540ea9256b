"""Stages spread over two worker processes, the store on an S3 server: the same bytes as a run alone, whoever is killed."""

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REWARD = """\
import time


def reward(prompts, completions, answer, **columns):
    time.sleep(0.5)  # so that there is a middle to be killed in
    return [sum(letter in right for letter in said) for said, right in zip(completions, answer, strict=True)]
"""


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
    """Many small parts, slowly sampled and scored, so that there is a middle to be killed in."""
    folder = tmp_path_factory.mktemp("runners") / "task"
    path = write_task(
        folder,
        prompts=40,
        completions__engine={"kind": "transformers", "max_num_seqs": 4},
        completions__sampling={"max_tokens": 24},
        completions__samples_per_part=4,
        run__part_size=2,
        run__parts_per_task=1,
    )
    (folder / "reward.py").write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, config: Path, prefect_server: str
) -> dict[str, dict[str, str]]:
    """Stage -> fingerprint -> sha256 of the rows, of a run in one process on a store in a folder."""
    folder = tmp_path_factory.mktemp("alone")
    run = Run(folder / "log", prefect_server, config, str(folder / "store"), "local", "rewards")
    run.ends_well()
    return digests(Store(folder / "store"))


@pytest.fixture(scope="module")
def sampled(
    tmp_path_factory: pytest.TempPathFactory, bucket: str, config: Path, prefect_server: str
) -> tuple[Store, dict[int, str], int]:
    """Completions on the S3 server, begun by two workers, whose driver is killed, and ended by a run without workers.

    The store, which processes were left a minute after the kill, and how many parts there were then.
    """
    folder = tmp_path_factory.mktemp("sampled")
    store = Store(f"{bucket}/sampled")
    run = Run(folder / "killed.log", prefect_server, config, store.url, "process", "completions")
    run.wait_for(lambda: committed(store, "completions") > 2)
    started = run.below()
    assert len(workers_of(started)) == 2, started
    run.process.kill()
    run.process.wait()
    left = left_of(started)
    kept = committed(store, "completions")
    Run(folder / "local.log", prefect_server, config, store.url, "local", "completions").ends_well()
    return store, left, kept


def test_killed_driver_leaves_no_worker_and_no_engine_behind(
    sampled: tuple[Store, dict[int, str], int], alone: dict[str, dict[str, str]]
):
    store, left, kept = sampled

    assert not left
    assert 2 < kept < len(alone["completions"])
    assert digests(store)["completions"] == alone["completions"]


@pytest.mark.parametrize("runner", ["process", "dask", "ray"])
def test_part_of_a_killed_worker_is_computed_by_another_with_the_bytes_of_a_run_alone(
    runner: str,
    sampled: tuple[Store, dict[int, str], int],
    bucket: str,
    config: Path,
    alone: dict[str, dict[str, str]],
    prefect_server: str,
    tmp_path: Path,
):
    store = Store(f"{bucket}/{runner}")
    for key in sampled[0].list():
        store.write_bytes(key, sampled[0].read_bytes(key))

    run = Run(tmp_path / "log", prefect_server, config, store.url, runner, "rewards")
    run.wait_for(lambda: committed(store, "rewards") > 0 and len(workers_of(run.below())) == 2)
    started = run.below()
    os.kill(workers_of(started)[0], signal.SIGKILL)
    summary = run.ends_well()

    assert digests(store) == alone
    assert summary["stages"]["rewards"]["parts_computed"] == len(alone["rewards"])
    assert summary["stages"]["completions"]["parts_computed"] == 0
    assert not left_of(started)
    assert not store.list("leases/parts")


class Run:
    """`qrpo run` on two workers, as a process of its own."""

    def __init__(self, log: Path, server: str, config: Path, store: str, runner: str, until: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QRPO_")}
        arguments = ["run", str(config), "--store", store, "--until", until, "--json"]
        arguments += ["--set", f"run.runner={runner}", "--set", "run.workers=2"]
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("qrpo"), *arguments],
                env={**environment, "PREFECT_API_URL": server},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def ends_well(self) -> dict[str, Any]:
        """Its summary."""
        assert self.process.wait(timeout=500) == 0, self.log.read_text()
        summary: dict[str, Any] = json.loads(self.log.read_text().splitlines()[-1])
        return summary

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 500
        while not condition():
            assert self.process.poll() is None, f"it ended before it could be killed:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def below(self) -> dict[int, tuple[int, str, str]]:
        """Every process below it: id -> (parent, when it started, command line)."""
        return descendants(self.process.pid)


def committed(store: Store, stage: str) -> int:
    return sum(key.endswith(".json") for key in store.list(f"parts/{stage}"))


def digests(store: Store) -> dict[str, dict[str, str]]:
    """What every part was asked to be and came to be: stage -> fingerprint -> sha256 of its rows."""
    found: dict[str, dict[str, str]] = {}
    for key in store.list("parts"):
        if key.endswith(".json"):
            record = json.loads(store.read_bytes(key))
            found.setdefault(record["stage"], {})[record["fingerprint"]] = record["files"][0][3]
    return found


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
    """Those that have started an engine or a reward."""
    return sorted({parent for parent, _, command in processes.values() if "qrpo.serving" in command})


def left_of(processes: dict[int, tuple[int, str, str]]) -> dict[int, str]:
    """Those that still live after a minute, with their command lines."""
    deadline = time.monotonic() + 60
    while (left := _living(processes)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _living(processes: dict[int, tuple[int, str, str]]) -> dict[int, str]:
    now = {process: status_of(process) for process in processes}
    return {
        process: was[2] for process, was in processes.items() if (is_ := now[process]) and is_[1] == was[1]
    }
