"""The whole pipeline on a real S3 server, and two runs at once on one store."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import Store

pytestmark = pytest.mark.slow

SECRET = "a-secret-that-must-not-be-seen"


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str) -> Iterator[str]:
    """A bucket of its own on the S3 server, which the environment reaches meanwhile; its URL."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAPIPELINETEST")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="pipeline")
        yield "s3://pipeline"


def test_pipeline_runs_on_an_object_store_and_is_cached_there(
    bucket: str, write_task: Callable[..., Path], qrpo_process: Callable[..., Any], tmp_path: Path
):
    config = write_task(tmp_path, prompts=16, prompts__eval_fraction=0.3, policy__epochs=1)
    url = f"{bucket}/store"

    first = qrpo_process("run", config, "--store", url, "--json")
    assert first.returncode == 0, first.stderr
    again = qrpo_process("run", config, "--store", url, "--json")
    assert again.returncode == 0, again.stderr

    stages = json.loads(first.stdout)["stages"]
    cached = json.loads(again.stdout)["stages"]
    assert stages["policy"]["parts_computed"] == 1
    assert all(stage["parts_computed"] == 0 for stage in cached.values())
    assert {name: stage["fingerprint"] for name, stage in stages.items()} == {
        name: stage["fingerprint"] for name, stage in cached.items()
    }
    store = Store(url)
    for key in store.list():
        assert SECRET.encode() not in store.read_bytes(key), key
    assert SECRET not in first.stdout + first.stderr
    assert not list(tmp_path.rglob("*.parquet"))  # nothing passed through the working folder


def test_object_store_gives_the_same_bytes_as_a_folder(
    bucket: str, write_task: Callable[..., Path], qrpo_process: Callable[..., Any], tmp_path: Path
):
    config = write_task(tmp_path, prompts=16, prompts__eval_fraction=0.3, policy__epochs=1)

    done = qrpo_process("run", config, "--store", tmp_path / "local", "--until", "quantiles", "--json")

    assert done.returncode == 0, done.stderr
    remote, local = Store(f"{bucket}/store"), Store(tmp_path / "local")
    parquet = [key for key in local.list("parts") if key.endswith(".parquet")]
    assert len(parquet) >= 8
    for key in parquet:
        assert remote.read_bytes(key) == local.read_bytes(key), key


def test_two_runs_at_once_share_the_work(
    write_task: Callable[..., Path], start_qrpo: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
):
    config = write_task(tmp_path, prompts=40, run__parts_per_task=1)
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    runs = [
        start_qrpo(
            log,
            "run",
            config,
            "--store",
            tmp_path / "store",
            "--set",
            f"name={log.stem}",
            "--until",
            "shards",
            "--json",
        )
        for log in logs
    ]

    codes = [run.wait(timeout=400) for run in runs]

    assert codes == [0, 0], [log.read_text() for log in logs]
    summaries = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    for stage in ("completions", "rewards", "quantiles", "shards"):
        first, second = (summary["stages"][stage] for summary in summaries)
        assert first["fingerprint"] == second["fingerprint"]
        total = first["parts_computed"] + first["parts_cached"]
        assert first["parts_computed"] + second["parts_computed"] == total, stage
    assert not os.listdir(tmp_path / "store" / "leases" / "holders")
