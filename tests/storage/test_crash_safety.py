"""Killed, or without power, at every write, rename and commit: nothing committed is lost, repeated or half there."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import storage
from storage import Store
from storage.crashpoints import CRASH_POINTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs flush every file, and the flushes are recorded anyway."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def crash_everywhere(url: str, mode: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.storage.crash_run", url, mode]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    totals = json.loads(shown.stdout)
    summary = f"{totals['points']} points, {totals['resumed']} resumed, {totals['identical']} identical"
    sys.stdout.write(f"{mode}: {summary}\n{shown.stderr}")
    assert totals["resumed"] == totals["identical"] == totals["points"]
    assert totals["recomputed"] == totals["rewritten"] == 0
    return totals


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "twice", "power"])
def test_a_run_ended_at_any_point_resumes_to_the_uninterrupted_result(fast_folder: Path, mode: str) -> None:
    totals = crash_everywhere(str(fast_folder), mode)
    assert totals["points"] > (30 if mode == "twice" else 90)
    if mode != "twice":
        assert set(totals["names"]) == {name for name in CRASH_POINTS if not name.startswith("put-")}


@pytest.mark.slow
def test_a_run_on_an_object_store_killed_at_any_point_resumes_too(s3_store: Store) -> None:
    totals = crash_everywhere(s3_store.url, "kill")
    assert totals["points"] > 25
    assert {"put-before", "put-after", "delete-before"} <= set(totals["names"])


def test_every_crash_point_in_the_code_is_enumerated() -> None:
    called = {
        name
        for path in Path(storage.__file__).parent.glob("*.py")
        for name in re.findall(r'crash_point\("([^"]+)"', path.read_text())
    }
    assert called == set(CRASH_POINTS)


def test_temporary_files_of_killed_writers_are_hidden_and_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_bytes("parts/kept", b"x")
    (tmp_path / "parts" / ".tmp-dead").write_bytes(b"half")
    assert store.list() == ["parts/kept"]
    assert [info.key for info in store.files.sweep(older_than=3600)] == []
    assert [info.key for info in store.files.sweep(older_than=-1)] == ["parts/.tmp-dead"]
    assert not (tmp_path / "parts" / ".tmp-dead").exists()
