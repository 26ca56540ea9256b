"""`qrpo verify` and `qrpo gc` on the store of a real run."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import storage
from storage import Store
from storage.crashpoints import on_crash_point
from storage.gc import collect, plan_gc
from tests.support.flows import QRPO, clean_environment
from tests.support.pipeline import TinyPipeline
from tests.support.processes import descendants, eventually, running, survivors

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
    repaired = qrpo("verify", "--repair", "--trust", "--store", store, "--json")
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
    kept = qrpo("gc", "--store", store, "--grace", "0", "--yes", "--json")
    assert json.loads(kept.stdout)["bytes"] == 0  # what the run's former configuration made is kept too
    versions = ("--versions", "1", "--grace", "0")
    planned = qrpo("gc", "--store", store, *versions, "--json")
    assert parts() == everything
    young = qrpo("gc", "--store", store, "--versions", "1", "--yes", "--json")
    assert json.loads(young.stdout)["bytes"] == 0  # all of it is younger than the hour that is left alone
    removed = qrpo("gc", "--store", store, *versions, "--yes", "--json")

    assert json.loads(planned.stdout)["keys"] == json.loads(removed.stdout)["keys"]
    assert 0 < len(parts()) < len(everything)
    assert qrpo("verify", "--store", store).exit_code == 0
    again = qrpo(*run, "--json")
    assert all(stage["parts_computed"] == 0 for stage in json.loads(again.stdout)["stages"].values())


def test_gc_keeps_the_finished_parts_of_a_killed_stage(
    tmp_path: Path,
    prefect_server: str,
    write_task: Callable[..., Path],
    qrpo: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, tuple[int, str]]],
):
    config = write_task(
        tmp_path / "task",
        completions__engine={"kind": "transformers", "max_num_seqs": 4},
        completions__sampling={"max_tokens": 24},
        completions__samples_per_part=4,
        run__part_size=4,
    )
    store = tmp_path / "store"
    arguments = ("run", config, "--store", store, "--until", "completions")
    log = tmp_path / "killed.log"
    environment = clean_environment() | {"PREFECT_API_URL": prefect_server}
    with running([QRPO, *arguments], log, env=environment) as process:
        finished = "parts/completions/*/*.json"
        eventually(lambda: any(store.glob(finished)), finished, every=0.01, log=log, process=process)
        family = descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        survivors(family, seconds=20)

    noted = Store(store).run("tiny") or {}
    assert set(noted["stages"]) == {"prompts", "reference"}
    assert set(noted["families"]) == {"completions"}
    records = sorted(store.glob(finished))
    before = snapshot(store / "parts")
    for flags in ((), ("--unfinished",)):
        removed = qrpo("gc", "--store", store, "--grace", "0", "--yes", "--json", *flags)
        assert json.loads(removed.stdout)["unfinished"] == []
        assert all(path.exists() for path in records)
    after = snapshot(store / "parts")
    assert {key: before[key] for key in after} == after
    assert set(before) - set(after) <= {key for key in before if ".tmp" in key}

    again = json.loads(qrpo(*arguments, "--json").stdout)["stages"]["completions"]
    assert again["parts_cached"] == len(records)
    assert "families" not in (Store(store).run("tiny") or {})
    dropped = json.loads(qrpo("gc", "--store", store, "--newest", "0", "--grace", "0", "--json").stdout)
    assert dropped["unfinished"] == []


def test_gc_lists_what_no_run_finishes_and_removes_it_only_when_told_to(
    tmp_path: Path, qrpo: Callable[..., Any]
):
    import pyarrow as pa

    from storage import PartKey

    store = Store(tmp_path / "store")
    key = PartKey("completions", "family", "part")
    store.commit_part(key, pa.table({"x": [1]}))
    gc = ("gc", "--store", tmp_path / "store", "--grace", "0", "--yes")

    kept = qrpo(*gc)
    assert "1 parts of unfinished stages" in kept.stdout
    assert "kept (add --unfinished to remove)" in kept.stdout
    assert store.part(key) is not None

    removed = json.loads(qrpo(*gc, "--unfinished", "--json").stdout)
    assert (removed["unfinished"], removed["keys"]) == ([key.record], [key.record])
    assert removed["bytes"] == removed["unfinished_bytes"] > 0
    assert store.part(key) is None


@pytest.mark.parametrize("rule", [{}, {"newest": 0}], ids=["every run kept", "no run kept"])
def test_gc_between_the_last_part_and_the_note_of_the_run_removes_no_part(
    tmp_path: Path, base_model: Path, prefect_server: str, rule: dict[str, int]
):
    pipeline = TinyPipeline.create(tmp_path / "task", base_model)
    store, config = pipeline.store, pipeline.config()
    collected = []

    def gc_before(name: str, key: str) -> None:
        manifest = key.startswith("artifacts/completions/") and key.endswith("/manifest.json")
        note = key == "runs/tiny.json" and bool(collected)
        if name == "put-before" and (manifest or note):
            on_crash_point(None)
            collect(store, plan_gc(store, grace=0, unfinished=True, **rule))
            collected.append(key)
            on_crash_point(gc_before)

    on_crash_point(gc_before)
    try:
        done = pipeline.run(config, until="completions")["completions"]
    finally:
        on_crash_point(None)

    assert len(collected) == 2
    manifest = storage.open(store, "tiny", "completions").manifest
    keys = [part.key for part in manifest.parts]
    assert len(store.find_parts(keys)) == len(keys) == done.parts_computed > 0
    assert store.list("leases") == []
