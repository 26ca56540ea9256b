"""Stages spread over two worker processes, the store on an S3 server: the same bytes as a run alone, whoever is killed."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from storage import Store
from storage.gc import collect, plan_gc
from tests.support.flows import QRPO, copy_store, digests, new_bucket, run_json
from tests.support.processes import Process, descendants, eventually, running, survivors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REWARD = """\
import time


def reward(prompts, completions, answer, **columns):
    time.sleep(0.4)  # so that there is a middle to be killed in
    return [sum(letter in right for letter in said) for said, right in zip(completions, answer, strict=True)]
"""


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str) -> Iterator[str]:
    with new_bucket(s3_endpoint, "runners") as url:
        yield url


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path]) -> Path:
    """Many small parts, slowly sampled and scored, so that there is a middle to be killed in."""
    folder = tmp_path_factory.mktemp("runners") / "task"
    path = write_task(
        folder,
        prompts=16,
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
    """The store of a run in one process, in a folder."""
    store = Store(tmp_path_factory.mktemp("alone") / "store")
    run_json("run", config, "--store", store.url, "--until", "rewards")
    return store


@pytest.fixture(scope="module")
def start(prefect_server: str, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Start one stage on two workers, as another process; the process and its log."""

    @contextmanager
    def run(store: Store, runner: str, stage: str) -> Iterator[tuple["Popen[bytes]", Path]]:
        log = tmp_path_factory.mktemp(runner) / "log"
        command = [QRPO, "run", config, "--store", store.url, "--only", stage, "--json"]
        command += ["--set", f"run.runner={runner}", "--set", "run.workers=2"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QRPO_")}
        with running(command, log, env={**environment, "PREFECT_API_URL": prefect_server}) as process:
            yield process, log

    return run


@pytest.fixture(scope="module")
def sampled(
    bucket: str, config: Path, alone: Store, prefect_server: str, start: Any
) -> tuple[Store, list[str], int]:
    """Completions on the S3 server: two workers began them, their driver was killed, a run without workers finished them.

    The store, which processes were left a minute after the kill, and how many parts there were then.
    """
    store = Store(f"{bucket}/sampled")
    copy_store(alone, store, without=("/completions/", "/rewards/"))
    with start(store, "process", "completions") as (driver, log):
        eventually(
            lambda: committed(store, "completions") > 2, "three parts", every=0.2, log=log, process=driver
        )
        family = descendants(driver.pid)
        assert len(workers_of(family)) == 2, family
        driver.kill()
        driver.wait()
        left = survivors(family)
    kept = committed(store, "completions")
    run_json("run", config, "--store", store.url, "--only", "completions")
    return store, left, kept


def test_killed_driver_leaves_no_worker_no_engine_and_no_lease_behind(
    sampled: tuple[Store, list[str], int], alone: Store
):
    store, left, kept = sampled

    assert not left
    assert 2 < kept < len(digests(alone, "completions"))
    assert digests(store, "completions") == digests(alone, "completions")
    collect(store, plan_gc(store))  # the driver may have died between a commit and the release of its lease
    assert not store.list("leases")


@pytest.mark.parametrize("runner", ["process", "dask", "ray"])
def test_part_of_a_killed_worker_is_computed_by_another_with_the_bytes_of_a_run_alone(
    runner: str, sampled: tuple[Store, list[str], int], bucket: str, alone: Store, start: Any
):
    store = Store(f"{bucket}/{runner}")
    copy_store(sampled[0], store, without=("leases/",))

    with start(store, runner, "rewards") as (driver, log):
        eventually(
            lambda: committed(store, "rewards") > 0 and len(workers_of(descendants(driver.pid))) == 2,
            "the first part and two workers",
            every=0.2,
            log=log,
            process=driver,
        )
        family = descendants(driver.pid)
        os.kill(workers_of(family)[0], signal.SIGKILL)
        assert driver.wait(timeout=500) == 0, log.read_text()

    assert digests(store) == digests(alone)
    summary = json.loads(log.read_text().splitlines()[-1])
    assert summary["stages"]["rewards"]["parts_computed"] == committed(alone, "rewards")
    assert not survivors(family)
    assert not store.list("leases")


def committed(store: Store, stage: str) -> int:
    return sum(key.endswith(".json") for key in store.list(f"parts/{stage}"))


def workers_of(family: list[Process]) -> list[int]:
    """Those that have started an engine or a reward."""
    return sorted({one.parent for one in family if one.serves_a_child})
