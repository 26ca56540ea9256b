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
from typer.testing import CliRunner

from flows.cli import app
from storage import Store
from storage.gc import collect, plan_gc

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
        prompts=24,
        completions__engine={"kind": "transformers", "max_num_seqs": 4},
        completions__sampling={"max_tokens": 24},
        completions__samples_per_part=4,
        run__part_size=2,
        run__parts_per_task=1,
    )
    (folder / "reward.py").write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, config: Path, prefect_server: str) -> Store:
    """What a run in one process makes of it, in a folder."""
    store = Store(tmp_path_factory.mktemp("alone") / "store")
    run_here(config, store, "--until", "rewards")
    return store


@pytest.fixture(scope="module")
def sampled(
    tmp_path_factory: pytest.TempPathFactory, bucket: str, config: Path, alone: Store, prefect_server: str
) -> tuple[Store, dict[int, str], int]:
    """Completions on the S3 server, begun by two workers, whose driver is killed, and ended by a run without workers.

    The store, which processes were left a minute after the kill, and how many parts there were then.
    """
    store = Store(f"{bucket}/sampled")
    copy(alone, store, lambda key: "/completions/" not in key and "/rewards/" not in key)
    run = Run(
        tmp_path_factory.mktemp("sampled") / "log",
        prefect_server,
        config,
        store.url,
        "process",
        "completions",
    )
    run.wait_for(lambda: committed(store, "completions") > 2)
    started = run.below()
    assert len(workers_of(started)) == 2, started
    run.process.kill()
    run.process.wait()
    left = left_of(started)
    kept = committed(store, "completions")
    run_here(config, store, "--only", "completions")
    return store, left, kept


def test_killed_driver_leaves_no_worker_no_engine_and_no_lease_behind(
    sampled: tuple[Store, dict[int, str], int], alone: Store
):
    store, left, kept = sampled

    assert not left
    assert 2 < kept < len(digests(alone)["completions"])
    assert digests(store)["completions"] == digests(alone)["completions"]
    collect(store, plan_gc(store))  # it may have died between a commit and giving the claim back
    assert not store.list("leases")


@pytest.mark.parametrize("runner", ["process", "dask", "ray"])
def test_part_of_a_killed_worker_is_computed_by_another_with_the_bytes_of_a_run_alone(
    runner: str,
    sampled: tuple[Store, dict[int, str], int],
    bucket: str,
    config: Path,
    alone: Store,
    prefect_server: str,
    tmp_path: Path,
):
    store = Store(f"{bucket}/{runner}")
    copy(sampled[0], store, lambda key: not key.startswith("leases/"))

    run = Run(tmp_path / "log", prefect_server, config, store.url, runner, "rewards")
    run.wait_for(lambda: committed(store, "rewards") > 0 and len(workers_of(run.below())) == 2)
    started = run.below()
    os.kill(workers_of(started)[0], signal.SIGKILL)
    summary = run.ends_well()

    assert digests(store) == digests(alone)
    assert summary["stages"]["rewards"]["parts_computed"] == committed(alone, "rewards")
    assert not left_of(started)
    assert not store.list("leases")


def run_here(config: Path, store: Store, *options: str) -> None:
    """`qrpo run` in this process."""
    done = CliRunner().invoke(app, ["run", str(config), "--store", store.url, *options])
    assert done.exit_code == 0, done.stderr


def copy(source: Store, target: Store, wanted: Callable[[str], bool]) -> None:
    for key in filter(wanted, source.list()):
        target.write_bytes(key, source.read_bytes(key))


class Run:
    """`qrpo run` on two workers, as a process of its own."""

    def __init__(self, log: Path, server: str, config: Path, store: str, runner: str, stage: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QRPO_")}
        arguments = ["run", str(config), "--store", store, "--only", stage, "--json"]
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
    return sorted(
        {parent for parent, _, command in processes.values() if "qrpo.processes.serving" in command}
    )


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
