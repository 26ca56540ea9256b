"""The whole pipeline on a real S3 server, and two runs at once on one store."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from storage import Store
from tests.support.flows import QRPO, clean_environment, invoke, new_bucket, run_json
from tests.support.processes import running

pytestmark = pytest.mark.slow

SECRET = "a-secret-that-must-not-be-seen"


@pytest.fixture(scope="module")
def on_s3(
    s3_endpoint: str, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Store, Any, Path]]:
    """The configuration of `trained` run on a bucket, from an empty folder: the store, what was printed, the folder."""
    folder = tmp_path_factory.mktemp("empty")
    with new_bucket(s3_endpoint, "pipeline", SECRET) as bucket, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        store = Store(f"{bucket}/store")
        done = invoke("run", trained / "config.yaml", "--store", store.url, "--json")
        assert done.exit_code == 0, done.stderr
        yield store, done, folder


def test_pipeline_runs_on_an_object_store_and_is_cached_there(on_s3: tuple[Store, Any, Path], trained: Path):
    store, first, folder = on_s3
    cached = run_json("run", trained / "config.yaml", "--store", store.url)["stages"]

    stages = json.loads(first.stdout.splitlines()[-1])["stages"]
    assert stages["policy"]["parts_computed"] == 1
    assert all(stage["parts_computed"] == 0 for stage in cached.values())
    fingerprints = [{name: one["fingerprint"] for name, one in of.items()} for of in (stages, cached)]
    assert fingerprints[0] == fingerprints[1]
    for key in store.list():
        assert SECRET.encode() not in store.read_bytes(key), key
    assert SECRET not in first.stdout + first.stderr
    assert not list(folder.rglob("*.parquet"))  # nothing passed through the working folder


def test_object_store_gives_the_same_bytes_as_a_folder(on_s3: tuple[Store, Any, Path], trained: Path):
    remote, local = on_s3[0], Store(trained / "store")
    stages = ("prompts", "completions", "rewards", "quantiles")
    parquet = [key for stage in stages for key in local.list(f"parts/{stage}") if key.endswith(".parquet")]
    assert len(parquet) >= 8
    for key in parquet:
        assert remote.read_bytes(key) == local.read_bytes(key), key


def test_two_runs_at_once_share_the_work(
    write_task: Callable[..., Path], prefect_server: str, tmp_path: Path
):
    config = write_task(tmp_path, prompts=40, run__parts_per_task=1)
    environment = clean_environment(PREFECT_API_URL=prefect_server)
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    with ExitStack() as stack:
        runs = []
        for log in logs:
            command = [QRPO, "run", config, "--store", tmp_path / "store", "--until", "shards", "--json"]
            command += ["--set", f"name={log.stem}"]
            runs.append(stack.enter_context(running(command, log, env=environment)))
        codes = [run.wait(timeout=400) for run in runs]

    assert codes == [0, 0], [log.read_text() for log in logs]
    summaries = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    for stage in ("completions", "rewards", "quantiles", "shards"):
        first, second = (summary["stages"][stage] for summary in summaries)
        assert first["fingerprint"] == second["fingerprint"]
        total = first["parts_computed"] + first["parts_cached"]
        assert first["parts_computed"] + second["parts_computed"] == total, stage
    assert not os.listdir(tmp_path / "store" / "leases" / "holders")
