"""`qrpo verify` and `qrpo gc` on the store of a real run."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import storage
from storage import DamagedError, Store
from storage.crashpoints import on_crash_point
from storage.gc import collect, plan_gc
from tests.support.flows import QRPO, clean_environment, copy_store, run_json
from tests.support.pipeline import TinyPipeline
from tests.support.processes import descendants, eventually, running, survivors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(
    prefect_server: str, write_task: Callable[..., Path], tmp_path_factory: Any
) -> tuple[Path, Path]:
    """A configuration and the store of its run up to `quantiles`."""
    folder = tmp_path_factory.mktemp("housekeeping")
    config = write_task(folder / "task", prompts=16)
    run_json("run", config, "--store", folder / "store", "--until", "quantiles")
    return config, folder / "store"


@pytest.fixture
def copied(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same with a copy of the store, to be changed."""
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "store"))


def test_damage_is_named_and_repair_computes_only_that_again(
    copied: tuple[Path, Path],
    qrpo: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, tuple[int, str]]],
):
    _, store = copied

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


@pytest.mark.parametrize("harm", ["delete the rows", "cut the rows", "delete the record"])
def test_a_cached_run_names_what_its_result_lacks(
    copied: tuple[Path, Path], qrpo: Callable[..., Any], harm: str
):
    config, store = copied
    table = next((store / "parts" / "completions").rglob("*.parquet"))
    match harm:
        case "delete the rows":
            table.unlink()
        case "cut the rows":
            table.write_bytes(table.read_bytes()[:-1])
        case "delete the record":
            table.with_suffix(".json").unlink()

    done = qrpo("run", config, "--store", store, "--until", "quantiles")

    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert table.stem in line
    assert "qrpo verify --repair" in line


def test_a_damaged_note_is_set_aside_and_the_next_run_notes_it_anew(
    copied: tuple[Path, Path], qrpo: Callable[..., Any]
):
    config, store = copied
    run = ("run", config, "--store", store, "--until", "quantiles", "--json")
    (store / "runs" / "tiny.json").write_text("[]")

    blocked = qrpo(*run)
    repaired = qrpo("verify", "--repair", "--store", store, "--json")
    again = qrpo(*run)

    assert blocked.exit_code == 1
    assert "qrpo verify --repair" in blocked.stderr
    assert repaired.exit_code == 0
    assert json.loads(repaired.stdout)["dropped"] == ["runs/tiny.json"]
    assert {stage["parts_computed"] for stage in json.loads(again.stdout)["stages"].values()} == {0}
    assert set(Store(store).run("tiny")["stages"]) == set(json.loads(again.stdout)["stages"])
    assert qrpo("verify", "--store", store).exit_code == 0


def read_all(store: Store, artifacts: dict[str, str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every reader of the product on every artifact: (stage, what reads)."""
    for stage, fingerprint in artifacts.items():
        manifest = store.manifest(stage, fingerprint)
        assert manifest is not None
        yield stage, lambda manifest=manifest: store.manifest(manifest.stage, manifest.fingerprint)
        tables = [part for part in manifest.parts if part.table is not None and part.rows]
        if tables:
            yield stage, lambda tables=tables: store.scan(tables).collect()
            yield stage, lambda tables=tables: store.dataset(tables).to_table()
        for part in manifest.parts:
            yield stage, lambda part=part: store.part(part.key)
            yield stage, lambda part=part: store.read_rejects(part)
            if part.table is None:
                yield stage, lambda part=part: storage.folder_digest(store.fetch_folder(part))
                yield stage, lambda part=part: store.read_file(part, "metrics.parquet")
            else:
                yield stage, lambda part=part: store.read_part(part)
                yield stage, lambda part=part: store.read_rows(part, 0, 1)
                yield (
                    stage,
                    lambda part=part: list(store.read_groups(part, store.footer(part).schema.names[:1])),
                )


@pytest.fixture(scope="module")
def evaluated(base_model: Path, prefect_server: str, tmp_path_factory: Any) -> Store:
    """The store of a whole run, in memory."""
    pipeline = TinyPipeline.create(tmp_path_factory.mktemp("evaluated") / "task", base_model, prompts=12)
    pipeline.run(pipeline.config({"run.part_size": 16}))
    return pipeline.store


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_flipped_bit_in_any_file_of_any_stage_never_changes_what_is_read(
    evaluated: Store, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = evaluated if kind == "memory" else Store(tmp_path / "store")
    if kind == "local":
        copy_store(evaluated, store)
    artifacts = {stage: noted["fingerprint"] for stage, noted in store.run("tiny")["stages"].items()}
    sound = [(stage, read, read()) for stage, read in read_all(store, artifacts)]
    dice = random.Random(0)
    errors: list[tuple[str, str, str]] = []

    for key in [key for key in store.list() if key.startswith(("parts/", "rejects/", "artifacts/"))]:
        content = bytearray(store.read_bytes(key))
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        before = store.read_bytes(key)
        store.write_bytes(key, bytes(content))
        stage = key.split("/")[1]
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        for of, read, expected in sound:
            if of != stage:
                continue
            try:
                found = read()
            except (DamagedError, pl.exceptions.ComputeError) as error:
                errors.append((stage, key, str(error)))
            else:
                assert found.equals(expected) if hasattr(found, "equals") else found == expected
        store.write_bytes(key, before)

    assert {stage for stage, _, _ in errors} == set(artifacts)
    assert all(key in error and "qrpo verify --repair" in error for _, key, error in errors)


def test_gc_removes_what_no_run_needs_and_only_when_told_to(
    copied: tuple[Path, Path], qrpo: Callable[..., Any]
):
    config, store = copied
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
