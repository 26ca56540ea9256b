import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

import storage
from storage import Manifest, Store, StoreError, manifest_of
from storage.gc import collect, plan_gc
from storage.leases import Leases
from storage.verify import verify
from tests.support.storage import REJECTS, part_key, scores


@pytest.fixture
def make_run(store: Store) -> Callable[..., dict[str, Manifest]]:
    """make_run("name", [1, 2]): a run of two stages whose second has these parts; the first is shared by all runs."""

    def make(name: str, numbers: list[int]) -> dict[str, Manifest]:
        base = store.commit_part(part_key("metrics", 0), pa.table({"x": [1]}))
        parent = store.commit_manifest(manifest_of("metrics", "base", [base]))
        parts = [
            store.commit_part(part_key("rewards", n), scores(10, seed=n), rejects=REJECTS) for n in numbers
        ]
        made = manifest_of("rewards", parts[0].family, parts, parents={"metrics": parent.fingerprint})
        made = store.commit_manifest(made)
        store.write_run(name, {"stages": {"rewards": {"fingerprint": made.fingerprint}}})
        return {"metrics": parent, "rewards": made}

    return make


def test_a_dropped_run_goes_with_just_its_own_parts(
    store: Store, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a", [1, 2, 3])
    kept = make_run("b", [2, 3, 4])
    before = {info.key: info.bytes for info in store.listing()}
    time.sleep(0.01)
    with monkeypatch.context() as patch:  # no record of a part in a manifest is read
        patch.setattr(store.files, "read_many", lambda keys: pytest.fail(f"{list(keys)} are read"))
        plan = plan_gc(store, grace=0)  # without a rule every run is kept
    assert (plan.keys, plan.bytes, plan.kept_bytes) == ((), 0, sum(before.values()))
    plan = plan_gc(store, keep_runs=["b"], grace=0)
    assert plan.drop_runs == ("a",)
    assert [key.fingerprint for key in plan.parts] == [storage.fingerprint(["rewards", "family", 1])]
    assert set(store.list()) == set(before)  # a plan changes nothing

    assert collect(store, plan) == plan.bytes
    after = {info.key: info.bytes for info in store.listing()}
    assert sum(before.values()) - sum(after.values()) == plan.bytes
    assert store.runs() == ["b"]
    assert list(verify(store)) == []
    assert storage.open(store, "b", "rewards").manifest == kept["rewards"]
    assert (
        store.manifest("metrics", kept["metrics"].fingerprint) == kept["metrics"]
    )  # a parent of what is kept
    assert plan_gc(store, keep_runs=["b"], grace=0).keys == ()


def test_newest_and_age_choose_runs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for day, name in enumerate(["old", "middle", "new"]):
        store.write_run(name, {"stages": {}})
        when = time.time() - (3 - day) * 86_400
        os.utime(tmp_path / "runs" / f"{name}.json", (when, when))
    assert plan_gc(store, newest=1).keep_runs == ("new",)
    assert plan_gc(store, newest=2).keep_runs == ("middle", "new")
    assert plan_gc(store, max_age=2.5 * 86_400).keep_runs == ("middle", "new")
    assert plan_gc(store, keep_runs=["old"], newest=1).keep_runs == ("new", "old")
    assert plan_gc(store, newest=0).keep_runs == ()
    assert plan_gc(store).keep_runs == ("middle", "new", "old")
    with pytest.raises(StoreError, match="no run missing to keep; there is middle, new, old"):
        plan_gc(store, keep_runs=["missing"])


def test_parts_of_an_unfinished_run_stay_while_it_lives_or_they_are_young(store: Store) -> None:
    key = part_key("rewards")
    store.commit_part(key, scores(10))
    time.sleep(0.01)
    assert plan_gc(store).parts == ()  # younger than an hour
    before = plan_gc(store, grace=0, unfinished=True)
    assert before.parts == (key,)
    with Leases(store) as leases:
        leases.protect(key.family)
        plan = plan_gc(store, grace=0, unfinished=True)
        assert (plan.parts, plan.unfinished) == ((), ())
        collect(store, before)  # a plan that was made before the run began
        assert store.part(key) is not None
    plan = plan_gc(store, grace=0)
    assert (plan.parts, plan.unfinished) == ((), (key,))
    assert plan.unfinished_bytes > 0
    plan = plan_gc(store, grace=0, unfinished=True)
    assert (plan.parts, plan.unfinished) == ((key,), (key,))


def test_parts_of_a_stage_that_a_kept_run_has_not_finished_stay(store: Store, make_run) -> None:
    make_run("a", [1])
    begun = [part_key("completions", n) for n in range(3)]
    for key in begun:
        store.commit_part(key, scores(10))
    families = {"families": {"completions": [begun[0].family]}}
    store.write_run("a", {**(store.run("a") or {}), **families})
    store.write_bytes("families/completions/other.json", b"{}")
    store.write_bytes("answers/judge/one.json", b"{}")
    before = store.list()
    time.sleep(0.01)

    for unfinished in (False, True):
        plan = plan_gc(store, grace=0, unfinished=unfinished)
        assert (plan.keys, plan.unfinished) == ((), ())
        collect(store, plan)
        assert store.list() == before

    collect(store, plan_gc(store, newest=0, grace=0))
    assert store.list("artifacts") == store.list("runs") == []
    assert {key.split(".")[0] for key in store.list("parts")} == {key.folder for key in begun}
    plan = plan_gc(store, newest=0, grace=0, unfinished=True)
    assert set(plan.unfinished) == set(begun)
    collect(store, plan)
    assert store.list() == ["answers/judge/one.json", "families/completions/other.json"]


def test_what_a_run_finished_after_the_plan_stays(store: Store, make_run) -> None:
    key = part_key("completions")
    record = store.commit_part(key, scores(10))
    old = make_run("old", [1, 2])
    time.sleep(0.01)
    plan = plan_gc(store, newest=0, grace=0, unfinished=True)
    assert key in plan.parts
    assert old["rewards"].key in plan.manifests

    with Leases(store) as leases:
        leases.protect(key.family)
        made = store.commit_manifest(manifest_of("completions", key.family, [record]))
        named = {"completions": made, "rewards": old["rewards"]}
        stages = {stage: {"fingerprint": manifest.fingerprint} for stage, manifest in named.items()}
        store.write_run("new", {"stages": stages})
    freed = collect(store, plan)

    assert store.runs() == ["new"]
    assert freed == plan.files["runs/old.json"].bytes
    assert list(verify(store)) == []
    assert storage.open(store, "new", "completions").manifest == made
    assert storage.open(store, "new", "rewards").manifest == old["rewards"]


def test_a_run_that_was_noted_again_after_the_plan_stays(store: Store, make_run) -> None:
    made = make_run("a", [1])
    time.sleep(0.01)
    plan = plan_gc(store, newest=0, grace=0)
    assert plan.drop_runs == ("a",)
    time.sleep(0.01)
    store.write_run("a", {**(store.run("a") or {}), "updated": "now"})
    assert collect(store, plan) == 0
    assert storage.open(store, "a", "rewards").manifest == made["rewards"]


WRITER = """
import sys, time
import pyarrow as pa
from storage import PartKey, Store, manifest_of
from storage.leases import Leases

store = Store(sys.argv[1])
for number in range(int(sys.argv[2])):
    family = f"family-{number}"
    with Leases(store) as leases:
        leases.protect(family)
        parts = []
        for part in range(4):
            parts.append(store.commit_part(PartKey("rewards", family, f"part-{part}"), pa.table({"x": [part]})))
            time.sleep(0.01)
        assert len(store.find_parts([part.key for part in parts])) == 4, "gc removed parts of a live run"
        time.sleep(0.02)
        made = store.commit_manifest(manifest_of("rewards", family, parts))
        store.write_run(f"run-{number}", {"stages": {"rewards": made.fingerprint}})
"""


def test_gc_in_a_loop_with_a_run_loses_nothing(tmp_path: Path) -> None:
    store, rounds, calls = Store(tmp_path), 12, 0
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(rounds)]) as writer:
        while writer.poll() is None:
            collect(store, plan_gc(store, grace=0, unfinished=True))
            list(store.files.sweep(3600.0))
            calls += 1
    assert writer.returncode == 0
    assert calls > 3
    assert len(store.runs()) == rounds
    assert list(verify(store)) == []
    assert len([key for key in store.list("parts") if key.endswith(".json")]) == 4 * rounds


def test_what_killed_writers_and_dead_runs_left_is_collected(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = part_key("rewards")
    store.commit_part(key, scores(10))
    store.delete(key.record)  # a payload without a record
    store.write_bytes(part_key("rewards", 1).folder + ".discarded", b"{}")
    code = (
        "import os, sys, storage; from storage.leases import Leases; l = Leases(storage.Store(sys.argv[1])); "
        "l.renew(); l.acquire(storage.PartKey('rewards', 'f', 'p')); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(store.list("leases")) == 2
    time.sleep(0.01)
    collect(store, plan_gc(store, grace=0))
    assert store.list() == []


def test_a_claim_of_a_run_that_died_elsewhere_after_its_commit_is_collected(tmp_path: Path) -> None:
    store = Store(tmp_path)
    leases = Leases(store)
    assert leases.acquire(part_key("rewards"))
    leases.renew()
    store.commit_part(part_key("rewards"), scores(10))  # and it dies before it gives the claim back
    [heartbeat] = (tmp_path / "leases" / "holders").iterdir()
    there = json.loads(heartbeat.read_text())
    heartbeat.write_text(json.dumps(there | {"machine": "another one", "process": 1}))
    assert plan_gc(store).keys == ()  # it may live

    os.utime(heartbeat, (time.time() - 3700, time.time() - 3700))
    collect(store, plan_gc(store))

    assert store.list("leases") == []
    assert store.part(part_key("rewards")) is not None


def test_what_a_killed_run_left_of_a_needed_part_is_collected(
    store: Store, make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(100))
    model = store.commit_folder(part_key("policy"), tmp_path / "model")
    artifact = store.commit_manifest(manifest_of("policy", model.family, [model]))
    make_run("a", [1])
    (part,) = storage.open(store, "a", "rewards").manifest.parts
    stages = {"rewards": storage.open(store, "a", "rewards").manifest.fingerprint}
    store.write_run("a", {"stages": {**stages, "policy": artifact.fingerprint}, "families": {"later": ["f"]}})
    before = set(store.list())

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    abandoned = store.files.scratch("parts/rewards/f/p.parquet")
    store.write_bytes(f"{model.key.folder}/0123456789ab/weights", bytes(100))
    store.write_bytes(part.key.rejects("0123456789ab"), b"rows")
    store.write_bytes(f"{part.key.folder}.discarded", b"{}")
    dead = abandoned.with_name(abandoned.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    for path in (abandoned, dead):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    done, unfinished, later = (
        store.work_dir(key) for key in (model.key, part_key("policy", 1), part_key("later"))
    )
    for folder in (done, unfinished, later):
        (folder / "checkpoint").write_bytes(bytes(10))
    time.sleep(0.01)
    assert plan_gc(store).keys == ()  # all of it is young

    plan = plan_gc(store, grace=0)
    assert collect(store, plan) == plan.bytes + len(b"half")
    assert {key for key in store.list() if not key.startswith("work/")} == before
    assert [path.exists() for path in (abandoned, dead)] == [True, False]  # this process may still write
    assert [path.exists() for path in (done, unfinished, later)] == [False, True, True]
    collect(store, plan_gc(store, grace=0, unfinished=True))
    assert [path.exists() for path in (unfinished, later)] == [False, True]
    assert list(verify(store)) == []


def test_a_damaged_manifest_stops_gc_where_it_is_needed(store: Store, make_run) -> None:
    made = make_run("a", [1])
    store.write_bytes(made["rewards"].key, b"{")
    with pytest.raises(StoreError, match="verify --repair"):
        plan_gc(store, grace=0)


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = store.commit_part(part_key("rewards"), scores(10))
    foreign = [tmp_path / "parts" / "my notes.json", tmp_path / "parts" / "rewards" / "f" / "größe.json"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert list(verify(store)) == []
    assert {info.key.split(".")[0] for info in store.listing()} == {record.key.folder}
    time.sleep(0.01)
    collect(store, plan_gc(store, grace=0, unfinished=True))
    assert store.part(record.key) is None
    assert all(path.read_text() == "mine" for path in foreign)
