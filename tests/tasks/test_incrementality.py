"""What changes is computed, what does not is reused: counted on real engines and rewards, row by row.

A base run through `shards` is made once; each test copies its store, changes one thing, asks `qrpo plan` for the reasons, runs
again, and looks at how many samples were drawn and how many completions scored.
"""

import json
import math
import random
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars
import pytest

import tasks.stages.rewards
from qrpo.errors import ConfigError
from storage import PartRecord, Store
from storage.leases import Leases
from tasks.config import PipelineConfig
from tasks.planner import plan_pipeline
from tasks.run_stage import StageResult, run_stage
from tasks.stages import STAGES
from tests.support.pipeline import TinyPipeline, sample_here
from tests.support.rewards import wait_until

pytestmark = pytest.mark.slow

PROMPTS, NUM_REF = 40, 4

REWARD = """\
from scale import SCALE

def reward(prompts, completions, **columns):
    return [SCALE * len(text) for text in completions]
"""


class Counts:
    """The work really done: (prompt, sample index) pairs drawn, and completions scored."""

    def __init__(self, drawn: list[tuple[str, int]]) -> None:
        self.drawn = drawn
        self.scored: list[Any] = []


class Task(TinyPipeline):
    """The tiny pipeline without fine-tuning and held-out prompts; `changes` says what a test changes."""

    changes: Mapping[str, Any] = MappingProxyType({})

    def config(self, changes: dict[str, Any] | None = None) -> PipelineConfig:
        plain = {
            "reference.sft": None,
            "prompts.eval_fraction": 0.0,
            "completions.sampling.max_tokens": 8,
            "quantiles.num_completions": None,
            "rewards.0.function": f"{self.folder / 'reward.py'}:reward",
        }
        return super().config({**plain, **self.changes, **(changes or {})})

    def compute(self, until: str = "rewards") -> dict[str, StageResult]:
        return self.run(self.config(), until)

    def records(self, stage: str) -> list[PartRecord]:
        return list(plan_pipeline(self.config(), self.store, until=stage)[stage].records.values())

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return self.store.scan(self.records(stage)).collect().to_dicts()

    def texts(self) -> dict[tuple[str, int], tuple[str, list[int]]]:
        return {
            (r["prompt_id"], r["sample_index"]): (r["text"], r["token_ids"]) for r in self.rows("completions")
        }

    def rewards(self) -> dict[tuple[str, int], float]:
        return {(row["prompt_id"], row["sample_index"]): row["reward"] for row in self.rows("rewards")}

    def preview(self) -> dict[str, dict[str, Any]]:
        return self.plan(self.config())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prefect_server: str) -> Task:
    """The run that all tests change."""
    task = Task.create(tmp_path_factory.mktemp("base") / "task", tiny_model, PROMPTS)
    (task.folder / "reward.py").write_text(REWARD)
    (task.folder / "scale.py").write_text("SCALE = 2.0\n")
    with pytest.MonkeyPatch.context() as patch:
        sample_here(patch)
        task.compute(until="shards")
    return task


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, drawn: list[tuple[str, int]]) -> Counts:
    counts = Counts(drawn)
    score = tasks.stages.rewards.Scorer.score

    def counted(self: Any, rows: Sequence[Any], known: Sequence[Any] | None = None) -> Any:
        counts.scored += [
            row for row, values in zip(rows, known or [{}] * len(rows), strict=True) if not values
        ]
        return score(self, rows, known)

    monkeypatch.setattr(tasks.stages.rewards.Scorer, "score", counted)
    return counts


@pytest.fixture
def task(base: Task, tmp_path: Path) -> Task:
    """A copy of the base run: folder, store and all."""
    return base.copy(tmp_path / "task")


def kept(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    """Whether every row that both runs have is the same in both, and there is any."""
    both = before.keys() & after.keys()
    return bool(both) and all(before[key] == after[key] for key in both)


def test_appended_prompts_alone_are_sampled_and_scored(task: Task, counts: Counts) -> None:
    texts, rewards = task.texts(), task.rewards()
    old = plan_pipeline(task.config(), task.store)["completions"].parts
    task.write_prompts(range(PROMPTS + 10))

    planned = task.preview()
    results = task.compute()

    assert planned["prompts"]["reasons"][0].startswith("prompts.source.0 changed from ")
    assert planned["prompts"]["reasons"][1:] == [
        "the source or how it is read changed: only parts with other prompts are new"
    ]
    assert 0 < planned["completions"]["parts_cached"] < len(old)
    assert planned["completions"]["parts_total"] > planned["completions"]["parts_cached"]
    assert "prompts is computed anew" in planned["completions"]["reasons"]
    assert results["completions"].parts_cached == planned["completions"]["parts_cached"]
    new = task.texts()
    assert len(new) == (PROMPTS + 10) * NUM_REF
    assert set(counts.drawn) == new.keys() - texts.keys()
    assert len(counts.drawn) == len(counts.scored) == 10 * NUM_REF
    assert kept(texts, new)
    assert kept(rewards, task.rewards())


@pytest.mark.parametrize(
    "kept_prompts", [range(PROMPTS), {*range(PROMPTS)} - {3, 17, 18}], ids=["all", "some"]
)
def test_removed_and_reordered_prompts_cost_nothing(
    task: Task, counts: Counts, kept_prompts: Collection[int]
) -> None:
    texts, rewards = task.texts(), task.rewards()
    numbers = list(kept_prompts)
    random.Random(1).shuffle(numbers)
    task.write_prompts(numbers)
    if len(numbers) < PROMPTS:
        reasons = task.preview()["rewards"]["reasons"]
        assert any(reason.startswith("completions is written anew (") for reason in reasons)

    task.compute()

    new = task.texts()
    assert not counts.drawn
    assert not counts.scored
    assert len(new) == len(numbers) * NUM_REF
    assert kept(texts, new)
    assert kept(rewards, task.rewards())


def test_raised_num_ref_draws_only_the_new_samples(task: Task, counts: Counts) -> None:
    texts, rewards = task.texts(), task.rewards()
    task.changes = {"completions.num_ref": 7}

    planned = task.preview()
    results = task.compute()

    assert "completions.num_ref changed from 4 to 7" in planned["completions"]["reasons"]
    assert planned["prompts"] == {
        **planned["prompts"],
        "parts_cached": planned["prompts"]["parts_total"],
        "reasons": [],
    }
    assert planned["completions"]["parts_cached"] == results["completions"].parts_cached > 0
    assert "completions is computed anew" in planned["rewards"]["reasons"]
    assert {index for _, index in counts.drawn} == {4, 5, 6}
    assert len(counts.drawn) == len(set(counts.drawn)) == len(counts.scored) == PROMPTS * 3
    assert kept(texts, task.texts())
    assert kept(rewards, task.rewards())


def test_num_ref_raised_within_a_block_keeps_the_samples_of_that_block(task: Task, counts: Counts) -> None:
    """4 to 5 samples with blocks of 3: the second block grows from one sample to two."""
    texts = task.texts()
    task.changes = {"completions.num_ref": 5, "completions.samples_per_part": 3}

    task.compute()

    assert {index for _, index in counts.drawn} == {4}
    assert len(counts.drawn) == len(counts.scored) == PROMPTS
    assert kept(texts, task.texts())


def test_fewer_samples_draw_and_score_nothing(task: Task, counts: Counts) -> None:
    texts, rewards = task.texts(), task.rewards()
    task.changes = {"completions.num_ref": 3}

    task.compute()

    assert not counts.drawn
    assert not counts.scored
    assert task.texts() == {key: value for key, value in texts.items() if key[1] < 3}
    assert task.rewards() == {key: value for key, value in rewards.items() if key[1] < 3}


@pytest.mark.parametrize("file", ["reward.py", "scale.py"])
def test_edited_reward_is_computed_anew_and_completions_are_not(
    task: Task, counts: Counts, file: str
) -> None:
    texts, rewards = task.texts(), task.rewards()
    path = task.folder / file
    path.write_text(
        {"reward.py": REWARD.replace("len(text)", "2 * len(text)"), "scale.py": "SCALE = 4.0\n"}[file]
    )

    planned = task.preview()
    task.compute()

    assert planned["completions"]["reasons"] == []
    total = planned["rewards"]["parts_total"]
    assert (planned["rewards"]["parts_cached"], total) == (0, planned["completions"]["parts_total"])
    (reason,) = planned["rewards"]["reasons"]
    assert reason.startswith("rewards.")
    assert file in reason
    assert "changed from" in reason
    assert "rewards is computed anew" in planned["quantiles"]["reasons"]
    assert not counts.drawn
    assert len(counts.scored) == PROMPTS * NUM_REF
    assert task.texts() == texts
    assert task.rewards() == {key: 2 * value for key, value in rewards.items()}


def test_raised_version_computes_that_stage_anew(
    task: Task, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = task.rewards()
    version = STAGES["rewards"].version + 1
    monkeypatch.setattr(tasks.stages.rewards, "VERSION", version)
    monkeypatch.setitem(STAGES, "rewards", replace(STAGES["rewards"], version=version))

    planned = task.preview()
    task.compute()

    assert planned["completions"]["reasons"] == []
    assert planned["rewards"]["parts_cached"] == 0
    assert "version" in " ".join(planned["rewards"]["reasons"])
    assert not counts.drawn
    assert len(counts.scored) == PROMPTS * NUM_REF
    assert task.rewards() == rewards


def test_sampling_settings_draw_everything_anew(task: Task, counts: Counts) -> None:
    task.changes = {"completions.sampling.temperature": 0.5}

    planned = task.preview()
    task.compute(until="completions")

    assert planned["completions"]["reasons"] == ["completions.sampling.temperature changed from 1.0 to 0.5"]
    assert planned["completions"]["parts_cached"] == 0
    assert len(counts.drawn) == PROMPTS * NUM_REF


def test_beta_concerns_the_policy_alone(task: Task) -> None:
    task.changes = {"policy.beta": 0.5}

    planned = task.preview()

    for stage in ("prompts", "completions", "rewards", "quantiles", "shards"):
        assert planned[stage]["parts_cached"] == planned[stage]["parts_total"] > 0
        assert planned[stage]["reasons"] == []
    assert (planned["policy"]["parts_cached"], planned["policy"]["parts_total"]) == (0, 1)


def test_stage_that_another_run_computes_meanwhile_is_complete(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import groups

    task.changes = {"quantiles.ties": "mid"}
    compute_missing = groups.compute_missing

    def by_another(*arguments: Any) -> list[Any]:
        assert compute_missing(*arguments)
        return []

    monkeypatch.setattr(groups, "compute_missing", by_another)

    done = task.compute(until="quantiles")["quantiles"]

    assert (done.parts_computed, done.rows) == (0, PROMPTS)
    assert not task.preview()["quantiles"]["reasons"]


def test_ties_redo_quantiles_and_shards_but_no_forward_pass(task: Task, counts: Counts) -> None:
    before = {row["prompt_id"]: row for row in task.rows("shards")}
    task.changes = {"quantiles.ties": "mid"}

    planned = task.preview()
    task.compute(until="shards")

    assert planned["rewards"]["reasons"] == []
    assert planned["quantiles"]["reasons"] == ["quantiles.ties changed from weak to mid"]
    assert planned["quantiles"]["parts_cached"] == planned["shards"]["parts_cached"] == 0
    assert "quantiles is computed anew" in planned["shards"]["reasons"]
    assert not counts.drawn
    assert not counts.scored
    assert sum(record.metadata["reused"] for record in task.records("shards")) == PROMPTS * NUM_REF
    after = {row["prompt_id"]: row for row in task.rows("shards")}
    assert {key: row["ref_logprob"] for key, row in after.items()} == {
        key: row["ref_logprob"] for key, row in before.items()
    }
    assert any(after[key]["quantile_reward"] != before[key]["quantile_reward"] for key in before)


def test_raised_num_ref_computes_only_new_reference_logprobs(task: Task, counts: Counts) -> None:
    before = {row["prompt_id"]: row for row in task.rows("shards")}
    task.changes = {"completions.num_ref": 6, "quantiles.num_completions": 4}

    task.compute(until="shards")

    assert sum(record.metadata["reused"] for record in task.records("shards")) == PROMPTS * NUM_REF
    for row in task.rows("shards"):
        assert row["ref_logprob"] == before[row["prompt_id"]]["ref_logprob"]
        assert row["num_ref"] == 5


def test_forced_stage_gives_the_same_rows_and_what_follows_stays(task: Task, counts: Counts) -> None:
    texts = task.texts()
    from prefect import flow

    @flow(name="forced")
    def forced() -> Any:
        return run_stage("completions", task.config(), task.store.url, force=True)

    result = forced()

    assert result.parts_cached == 0
    assert len(counts.drawn) == PROMPTS * NUM_REF
    assert task.texts() == texts
    assert task.preview()["rewards"]["reasons"] == [], (
        "the same bytes came, so what was made from them still holds"
    )


def test_changed_policy_does_not_stumble_over_the_policy_before(task: Task, counts: Counts) -> None:
    task.compute(until="policy")
    task.changes = {"quantiles.ties": "strict"}  # the same family of policies, other shards

    results = task.compute(until="policy")

    assert results["policy"].parts_computed == 1
    (record,) = task.records("policy")
    assert len(task.store.family_parts("policy", record.family)) == 2


def test_every_loss_trains_on_the_same_shards(task: Task) -> None:
    """Each is another policy of the same parents, and starts at the value that its definition has at the reference."""
    policies, first = {}, {}
    for loss in ("qrpo", "dpo", "rebel", "simpo", "sft"):
        task.changes = {"policy.loss": loss}
        assert {name for name, of in task.compute(until="policy").items() if of.parts_computed} == {"policy"}
        (policies[loss],) = task.records("policy")
        metrics = logged(task).drop_nulls("loss")
        assert metrics["step"].to_list() == [1, 2]
        assert metrics["grad_norm"].min() > 0  # type: ignore[operator]
        first[loss] = metrics["loss"][0]

    assert len({record.fingerprint for record in policies.values()}) == 5
    assert len({json.dumps(sorted(record.parents)) for record in policies.values()}) == 1
    assert first["dpo"] == pytest.approx(math.log(2), rel=1e-4)
    assert all(math.isfinite(loss) for loss in first.values())


def logged(task: Task) -> polars.DataFrame:
    (record,) = task.records("policy")
    data = task.store.read_file(record, "metrics.parquet")
    assert data is not None
    return polars.read_parquet(data)


def test_policy_on_two_processes_passes_on_their_failure_and_is_that_of_one(
    task: Task, tmp_path: Path
) -> None:
    two = task.copy(tmp_path / "two", Store(tmp_path / "store"))
    two.changes = {"policy.processes": 2, "policy.lora": {"target_modules": ["no_such_layer"]}}
    with pytest.raises(ConfigError, match=r"policy\.lora\.target_modules: .*no_such_layer"):
        two.compute(until="policy")
    two.changes = {"policy.processes": 2}
    two.compute(until="policy")
    task.compute(until="policy")

    assert [record.key for record in two.records("policy")] == [
        record.key for record in task.records("policy")
    ]
    for name in ("step", "loss", "grad_norm"):
        theirs, ours = (logged(each).drop_nulls("loss")[name].to_list() for each in (two, task))
        assert theirs == pytest.approx(ours, rel=1e-3)


def test_samples_wait_for_those_of_another_run_that_they_are_made_from(
    finished: TinyPipeline, drawn: list[tuple[str, int]], tmp_path: Path
) -> None:
    pipeline = finished.copy(tmp_path / "task")
    config = pipeline.config({"completions.sampling.temperature": 0.5})
    parts = plan_pipeline(config, pipeline.store)["completions"].parts
    made_from = {part.key: [key for key in part.inputs if key.stage == "completions"] for part in parts}
    later = next(key for key, earlier in made_from.items() if earlier)
    (first,) = made_from[later]

    def committed() -> set[str]:
        return set(pipeline.store.find_parts(made_from))

    with Leases(pipeline.store) as other, ThreadPoolExecutor(1) as threads:
        assert other.acquire(first)
        run = threads.submit(pipeline.run, config, "completions")
        assert wait_until(lambda: run.done() or len(committed()) == len(parts) - 2)
        assert not run.done()
        assert committed() == {key.fingerprint for key in made_from} - {first.fingerprint, later.fingerprint}
        other.release(first)
        run.result(timeout=120)
    assert len(committed()) == len(parts)
    assert len(drawn) == len(set(drawn))
