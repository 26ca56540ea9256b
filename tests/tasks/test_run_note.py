"""What a run notes of itself: one version for each configuration of its name, on the prompts that it started with."""

import json
import logging
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from flows.algorithm import pipeline as pipeline_flow
from flows.compare import compare
from flows.views.runs import RunArtifacts
from qrpo.errors import DataError
from storage import Store, file_digest
from storage.artifact import named_artifacts, run_versions
from storage.crashpoints import on_crash_point
from storage.gc import collect, plan_gc
from storage.leases import Leases
from tasks.planner import Planner, noted_prompts
from tasks.run_note import note_artifact
from tasks.run_stage import run_stage
from tasks.stages import STAGE_NAMES
from tests.support.pipeline import TinyPipeline
from tests.support.storage import at_once

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("drawn")]

GROWING = """
from pathlib import Path

def grow(prompts, completions, **columns):
    if len(prompts) == 1:  # the check before the run
        return [1.0]
    with Path(__file__).with_name("prompts.jsonl").open("a") as file:
        for text in completions:
            file.write(f'{{"prompt": "grown {abs(hash(text))}", "chosen": "one", "rejected": "no"}}\\n')
    return [float(len(text)) for text in completions]
"""


class MachineIsGone(Exception):
    """Raised where a machine dies."""


@pytest.fixture
def tiny(finished: TinyPipeline, tmp_path: Path) -> TinyPipeline:
    copied = finished.copy(tmp_path / "task")
    copied.store.delete("runs/tiny.json")
    copied.run(copied.config())  # notes its own paths
    return copied


def append(pipeline: TinyPipeline, number: int) -> None:
    with (pipeline.folder / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": f"appended {number}", "chosen": "one", "rejected": "no"}) + "\n")


def assert_of_one_lineage(store: Store, run: str) -> None:
    """Every artifact of every version was made from the other artifacts of that version."""
    for version in run_versions(store.run(run) or {}):
        named = named_artifacts(version)
        for stage, artifact in named.items():
            manifest = store.manifest(stage, artifact)
            assert manifest is not None
            assert {name: named[name] for name in manifest.parents} == manifest.parents
            reads = manifest.metadata["reads"]
            assert (
                reads.get("completions.num_ref", version["config"]["completions"]["num_ref"])
                == (version["config"]["completions"]["num_ref"])
            )


def test_a_changed_setting_under_one_name_keeps_what_it_replaces(
    tiny: TinyPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    store, first, second = tiny.store, tiny.config(), tiny.config({"completions.num_ref": 6})
    policy = RunArtifacts(store, "tiny").manifest("policy")
    log = logging.getLogger("qrpo")
    log.addHandler(caplog.handler)
    try:
        tiny.run(second, until="rewards")
    finally:
        log.removeHandler(caplog.handler)

    (line,) = {text for text in caplog.messages if "replaced" in text}
    assert "completions.num_ref changed from 4 to 6. The run's artifacts of completions, rewards, " in line
    assert "evaluation are replaced: they stay in the store" in line
    noted = store.run("tiny") or {}
    assert noted["config"]["completions"]["num_ref"] == 6
    assert list(RunArtifacts(store, "tiny").stages) == list(STAGE_NAMES[:4])
    assert_of_one_lineage(store, "tiny")
    with pytest.raises(DataError, match="Another configuration of this run made one"):
        RunArtifacts(store, "tiny").manifest("policy")

    collect(store, plan_gc(store, grace=0, unfinished=True))
    assert store.part(policy.parts[0].key) is not None
    again = tiny.run(first)
    assert sum(result.parts_computed for result in again.values()) == 0
    assert RunArtifacts(store, "tiny").manifest("policy") == policy
    assert_of_one_lineage(store, "tiny")

    collect(store, plan_gc(store, grace=0, unfinished=True, versions=1))
    assert sum(result.parts_computed for result in tiny.run(first).values()) == 0
    assert tiny.run(second, until="completions")["completions"].parts_computed > 0


def test_two_configurations_that_run_at_once_under_one_name_are_not_mixed(tiny: TinyPipeline) -> None:
    store = tiny.store
    configs = [tiny.config(), tiny.config({"completions.num_ref": 6})]
    for config in reversed(configs):
        tiny.run(config, until="quantiles")

    def note(number: int) -> None:
        planner = Planner(configs[number], Store(store.url))
        with Leases(planner.store, poll=0.001) as leases:
            for stage in STAGE_NAMES[:5]:
                note_artifact(planner, stage, {"fingerprint": planner.plan(stage).fingerprint}, leases)

    store.delete("runs/tiny.json")
    at_once(2, note)

    versions = run_versions(store.run("tiny") or {})
    assert sorted(version["config"]["completions"]["num_ref"] for version in versions) == [4, 6]
    assert [list(version["stages"]) for version in versions] == [sorted(STAGE_NAMES[:5])] * 2
    assert_of_one_lineage(store, "tiny")


def test_an_execution_option_makes_no_new_version(tiny: TinyPipeline) -> None:
    for changes in ({"run.part_size": 4}, {"completions.engine.max_num_seqs": 8}):
        tiny.run(tiny.config(changes))
        run_stage("rewards", tiny.config(changes), tiny.store.url)
        assert "history" not in (tiny.store.run("tiny") or {})


def test_a_note_of_an_earlier_release_goes_on(tiny: TinyPipeline) -> None:
    store = tiny.store
    noted = store.run("tiny") or {}
    store.write_run("tiny", {key: noted[key] for key in ("name", "config", "stages", "updated")})
    tiny.run(tiny.config({"policy.beta": 0.3}), until="policy")

    current, before = run_versions(store.run("tiny") or {})
    assert before["stages"] == noted["stages"]
    assert set(current["stages"]) == set(STAGE_NAMES) - {"evaluation"}
    tiny.run(tiny.config())
    assert named_artifacts(store.run("tiny") or {}) == named_artifacts(noted)
    assert len(run_versions(store.run("tiny") or {})) == 2


@pytest.mark.parametrize("later", ["round", "candidate"])
def test_prompts_that_arrive_during_a_run_wait_for_the_next(
    tmp_path: Path, tiny_model: Path, prefect_server: str, later: str
) -> None:
    tiny = TinyPipeline.create(tmp_path / "task", tiny_model)
    (tiny.folder / "growing.py").write_text(GROWING)
    changes = {
        "reference.sft": None,
        "rewards.0.function": f"{tiny.folder / 'growing.py'}:grow",
        "rounds.count": 2 if later == "round" else 1,
        "compare.seeds": [0],
        "compare.methods": {"qrpo": {"policy.beta": 0.5}, "dpo": {"policy.loss": "dpo"}},
    }
    config = tiny.config(changes)
    before = file_digest(str(tiny.folder / "prompts.jsonl"))

    (pipeline_flow if later == "round" else compare)(config, tiny.store.url)

    runs = [store_run for name in tiny.store.runs() if (store_run := tiny.store.run(name))]
    assert len(runs) == 2
    assert len({named_artifacts(run)["prompts"] for run in runs}) == 1
    manifest = tiny.store.manifest("prompts", named_artifacts(runs[0])["prompts"])
    assert manifest is not None
    assert manifest.rows == 24
    assert manifest.inputs["source"] == [before]


def test_each_stage_alone_keeps_the_prompts_of_its_run(tiny: TinyPipeline, prefect_server: str) -> None:
    config, store = tiny.config({"policy.beta": 0.7}), tiny.store
    source = tiny.folder / "prompts.jsonl"
    append(tiny, 1)
    assert run_stage("rewards", config, store.url).parts_computed == 0
    source.unlink()
    assert run_stage("quantiles", config, store.url).parts_computed == 0
    moved = tiny.config({"prompts.source": str(tiny.folder / "absent.jsonl")})
    with pytest.raises(DataError, match="absent"):
        run_stage("quantiles", moved, store.url)


def test_a_source_that_changes_before_it_is_read_is_named_by_what_was_read(
    tiny: TinyPipeline, prefect_server: str
) -> None:
    source = tiny.folder / "prompts.jsonl"
    planner = Planner(tiny.config(), tiny.store)
    append(tiny, 1)
    planner.plan("prompts")
    append(tiny, 2)
    result = run_stage("prompts", tiny.config(), tiny.store.url, planner=planner)

    assert result.rows == 26
    manifest = tiny.store.manifest("prompts", result.fingerprint)
    assert manifest is not None
    assert manifest.inputs["source"] == [file_digest(str(source))]
    noted = noted_prompts(tiny.config(), tiny.store)
    assert noted is not None
    assert noted.fingerprint == planner.plan("prompts").fingerprint == result.fingerprint
    assert run_stage("prompts", tiny.config(), tiny.store.url).parts_computed == 0


def test_a_cached_stage_reads_its_manifest_once(tiny: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    files, read = tiny.store.files, Counter[str]()
    plain = files.read
    monkeypatch.setattr(files, "read", lambda key: (read.update([key]), plain(key))[1])
    tiny.run(tiny.config())
    assert {count for key, count in read.items() if key.endswith("manifest.json")} == {1}


@pytest.mark.parametrize("altered", [False, True], ids=["sound", "altered"])
def test_training_on_an_object_store_goes_on_on_another_machine(
    tiny: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, altered: bool
) -> None:
    changes = {"policy.max_steps": 6, "policy.save_steps": 2, "policy.beta": 0.5}
    config, store = tiny.config(changes), tiny.store
    whole = tiny.copy(tmp_path / "whole")
    whole.run(whole.config(changes), until="policy")
    written: list[str] = []

    def die(name: str, key: str) -> None:
        if name == "put-after" and key.startswith("work/policy/"):
            written.append(key.split("/", 3)[3])
            if number == 0 and written[-1] == "checkpoint-4/whole.json":
                raise MachineIsGone

    for number in range(2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{number}"))
        on_crash_point(die)
        try:
            with pytest.raises(MachineIsGone) if number == 0 else nullcontext():
                tiny.run(config, until="policy")
        finally:
            on_crash_point(None)
        if number == 0:
            assert {name.split("/")[0] for name in written} == {"checkpoint-2", "checkpoint-4"}
            written.clear()
            (optimizer,) = (key for key in store.list("work") if "checkpoint-4/optimizer/__" in key)
            data = store.read_bytes(optimizer)
            store.write_bytes(optimizer, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] if altered else data)

    steps = {name.split("/")[0] for name in written}
    assert (steps == {"checkpoint-6"}) != altered, (
        "four steps are repeated only where the checkpoint is altered"
    )
    assert tiny.weights(config) == whole.weights(whole.config(changes))
    assert tiny.losses(config) == whole.losses(whole.config(changes))
    assert store.list("work") == []
