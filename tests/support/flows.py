"""The `qrpo` command in this process or as another process, and stores that several modules of `tests/flows` look into."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from storage import Store

QRPO = Path(sys.executable).with_name("qrpo")


def invoke(*arguments: Any) -> Any:
    """The `qrpo` command in this process: `.exit_code`, `.stdout`, `.stderr`."""
    from flows.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: Any) -> dict[str, Any]:
    """The JSON object that `qrpo ... --json` prints last, which must succeed."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unfolded(shown: str) -> str:
    """What was printed on one line, without the borders of boxes."""
    return " ".join(shown.replace("│", " ").split())


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what Prefect and `qrpo` read from it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "QRPO_"))}
    return {**kept, **changes}


@contextmanager
def new_bucket(endpoint: str, name: str, secret: str = "a-secret-key") -> Iterator[str]:
    """A new bucket on the S3 server, which the environment reaches while the block runs; its URL."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", f"AKIA{name.upper()}")
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
        yield f"s3://{name}"


def copy_store(source: Store, target: Store, *, without: tuple[str, ...] = ()) -> None:
    """Copy every file whose key contains none of the words `without`."""
    for key in source.list():
        if not any(word in key for word in without):
            target.write_bytes(key, source.read_bytes(key))


def digests(store: Store, stage: str = "") -> dict[str, str]:
    """The committed parts of one stage, or of all: fingerprint -> sha256 of the rows."""
    keys = [key for key in store.list(f"parts/{stage}".rstrip("/")) if key.endswith(".json")]
    records = [json.loads(store.read_bytes(key)) for key in keys]
    return {record["fingerprint"]: record["files"][0][3] for record in records}


def parts_of(store: Path, stage: str = "completions") -> dict[str, int]:
    """The records of a stage's committed parts in a folder, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in store.glob(f"parts/{stage}/*/*.json")}
