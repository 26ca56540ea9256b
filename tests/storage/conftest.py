import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import storage
from tests.support.storage import SCORES, SHARDS


@pytest.fixture
def s3_store(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> storage.Store:
    """A store in a bucket of its own."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecretaccesskey")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    bucket = f"bucket-{abs(hash(request.node.nodeid)) % 10**12}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return storage.Store(f"s3://{bucket}/some/folder")


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> storage.Store:
    """A store on each kind of backend."""
    if request.param == "local":
        return storage.Store(tmp_path / "store")
    if request.param == "memory":
        return storage.Store(f"memory://{tmp_path.name}-{os.getpid()}/store")
    return request.getfixturevalue("s3_store")


@pytest.fixture
def part_key() -> Callable[..., storage.PartKey]:
    """part_key("rewards", 3): the key of a part; the same number gives the same key."""

    def make(stage: str, number: int = 0, family: str = "family") -> storage.PartKey:
        return storage.PartKey(
            stage, storage.fingerprint([stage, family]), storage.fingerprint([stage, family, number])
        )

    return make


@pytest.fixture
def rewards_table() -> Callable[..., pa.Table]:
    """rewards_table(rows, seed): a table of the rewards stage."""

    def make(rows: int = 10, seed: int = 0) -> pa.Table:
        rng = np.random.default_rng(seed)
        return pa.table(
            {
                "prompt_id": [f"prompt-{seed}-{row // 2}" for row in range(rows)],
                "sample_index": pa.array([row % 2 for row in range(rows)], pa.int32()),
                "origin": ["reference"] * rows,
                "reward": pa.array(rng.normal(size=rows), pa.float32()),
                "components": pa.array(
                    [[{"name": "length", "value": 1.0}]] * rows,
                    SCORES.schema.field("components").type,
                ),
                "error": pa.nulls(rows, pa.string()),
            }
        )

    return make


@pytest.fixture(scope="session")
def shards_table() -> Callable[..., pa.Table]:
    """shards_table(rows, first): a table of the shards stage; the token ids of row i say i."""

    def make(rows: int = 10, first: int = 0, tokens: int = 7, ragged: bool = True) -> pa.Table:
        made: list[dict[str, Any]] = []
        for row in range(first, first + rows):
            completions = 1 + row % 3 if ragged else 2
            values = [np.float32((row % 97) / 97)] * completions
            made.append(
                {
                    "prompt_id": f"prompt-{row}",
                    "prompt_token_ids": [row] * (1 + row % 5),
                    "completion_token_ids": [[row + k] * (tokens + k) for k in range(completions)],
                    "sample_index": list(range(completions)),
                    "origin": ["offline"] * completions,
                    "reward": [float(row)] * completions,
                    "quantile_reward": values,
                    "quantile_low": values,
                    "quantile_high": values,
                    "ref_logprob": [-float(row)] * completions,
                    "num_ref": 10,
                    "ref_mean": 0.5,
                    "ref_std": None,
                }
            )
        return pa.Table.from_pylist(made, schema=SHARDS.schema)

    return make
