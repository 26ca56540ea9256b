import os
from pathlib import Path

import pytest

import storage


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
