"""`qrpo verify` and `qrpo gc` on the store of a real run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(
    prefect_server: str,
    write_task: Callable[..., Path],
    qrpo_process: Callable[..., Any],
    tmp_path_factory: Any,
) -> tuple[Path, Path]:
    """A configuration and the store of its run up to `quantiles`."""
    folder = tmp_path_factory.mktemp("housekeeping")
    config = write_task(folder / "task", prompts=16)
    done = qrpo_process(
        "run", config, "--store", folder / "store", "--until", "quantiles", PREFECT_API_URL=prefect_server
    )
    assert done.returncode == 0, done.stderr
    return config, folder / "store"


def test_damage_is_named_and_repair_computes_only_that_again(
    finished: tuple[Path, Path],
    qrpo: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, tuple[int, str]]],
):
    _, store = finished

    def tables() -> dict[str, tuple[int, str]]:
        return {key: seen for key, seen in snapshot(store / "parts").items() if key.endswith(".parquet")}

    before = tables()
    damaged = next(key for key in before if key.startswith("rewards/"))
    content = bytearray((store / "parts" / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (store / "parts" / damaged).write_bytes(content)

    found = qrpo("verify", "--store", store)
    repaired = qrpo("verify", "--repair", "--store", store, "--json")
    clean = qrpo("verify", "--store", store)

    assert found.exit_code == 1
    assert damaged in found.stdout
    assert repaired.exit_code == 0, repaired.stdout
    assert json.loads(repaired.stdout)["runs"] == ["tiny"]
    after = tables()
    assert {key for key in before if after[key][0] != before[key][0]} == {damaged}
    assert after[damaged][1] == before[damaged][1]
    assert clean.exit_code == 0


def test_gc_removes_what_no_run_needs_and_only_when_told_to(
    finished: tuple[Path, Path], qrpo: Callable[..., Any]
):
    config, store = finished
    cooler = ("--until", "completions", "--set", "completions.sampling.temperature=0.5")
    run = ("run", config, "--store", store, *cooler)
    assert qrpo(*run).exit_code == 0

    def parts() -> set[str]:
        return {path.stem for path in (store / "parts").rglob("*.parquet")}

    everything = parts()
    planned = qrpo("gc", "--store", store, "--grace", "0", "--json")
    assert parts() == everything
    young = qrpo("gc", "--store", store, "--yes", "--json")
    assert json.loads(young.stdout)["bytes"] == 0  # all of it is younger than the hour that is left alone
    removed = qrpo("gc", "--store", store, "--grace", "0", "--yes", "--json")

    assert json.loads(planned.stdout)["keys"] == json.loads(removed.stdout)["keys"]
    assert 0 < len(parts()) < len(everything)
    assert qrpo("verify", "--store", store).exit_code == 0
    again = qrpo(*run, "--json")
    assert all(stage["parts_computed"] == 0 for stage in json.loads(again.stdout)["stages"].values())
