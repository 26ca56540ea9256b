"""What changes is computed, what does not is reused: counted on real engines and rewards, row by row.

A base run through `shards` is made once; each test copies its store, changes one thing, asks `qrpo plan` for the reasons, runs
again, and looks at how many samples were drawn and how many completions scored.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars
import pytest

import tasks.stages.completions
import tasks.stages.rewards
from flows.views.plan import preview
from qrpo.engines import open_engine
from qrpo.errors import ConfigError
from storage import PartRecord, Store
from tasks.config import PipelineConfig, parse_config
from tasks.planner import plan_pipeline
from tasks.run_stage import run_stage
from tasks.stages import STAGES
from tasks.stages.policy import compute as compute_policy
from tests.support.pipeline import CountingEngine

pytestmark = pytest.mark.slow

PROMPTS, NUM_REF = 40, 4
Key = tuple[str, str, int]

REWARD = """\
from scale import SCALE

def reward(prompts, completions, **columns):
    return [SCALE * len(text) for text in completions]
"""


class Counts:
    """The work really done: (prompt, sample index) pairs drawn, and completions scored."""

    def __init__(self) -> None:
        self.drawn: list[tuple[str, int]] = []
        self.scored: list[Key] = []


class Task:
    """A folder with prompts and reward, a store beside it, and the configuration."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.changes: dict[str, Any] = {}

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    @property
    def config(self) -> PipelineConfig:
        raw: dict[str, Any] = {
            "prompts": {"source": str(self.folder / "prompts.jsonl")},
            "reference": {"model": {"path": str(self.model)}},
            "completions": {
                "num_ref": NUM_REF,
                "samples_per_part": 2,
                "engine": {"kind": "transformers", "max_num_seqs": 128},
                "sampling": {"max_tokens": 8},
            },
            "rewards": [
                {"name": "length", "function": f"{self.folder / 'reward.py'}:reward", "kind": "function"}
            ],
            "policy": {"learning_rate": 1e-3},
            "run": {"part_size": 8},
        }
        for path, value in self.changes.items():
            *sections, key = path.split(".")
            target = raw
            for section in sections:
                target = target.setdefault(section, {})
            target[key] = value
        return parse_config(raw)

    def write_prompts(self, numbers: Sequence[int]) -> None:
        rows = [{"prompt": f"count to {number}", "answer": str(number)} for number in numbers]
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, until: str = "rewards") -> dict[str, Any]:
        """Run the stages up to `until` in one Prefect flow; the results by stage."""
        from prefect import flow

        names = list(STAGES)
        config, url = self.config, self.store.url

        @flow(name="stages")
        def stages() -> list[Any]:
            return [run_stage(name, config, url) for name in names[: names.index(until) + 1]]

        return {result.stage: result for result in stages()}

    def rows(self, stage: str) -> list[dict[str, Any]]:
        plan = plan_pipeline(self.config, self.store, until=stage)[stage]
        return self.store.scan(list(plan.records.values())).collect().to_dicts()

    def texts(self) -> dict[tuple[str, int], tuple[str, list[int]]]:
        return {
            (r["prompt_id"], r["sample_index"]): (r["text"], r["token_ids"]) for r in self.rows("completions")
        }

    def rewards(self) -> dict[tuple[str, int], float]:
        return {(row["prompt_id"], row["sample_index"]): row["reward"] for row in self.rows("rewards")}

    def preview(self) -> dict[str, dict[str, Any]]:
        stages: dict[str, dict[str, Any]] = preview(self.config, self.store)["stages"]
        return stages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qrpo.tiny import build_tiny_model

    texts = [f"count to {number}: one two three four" for number in range(60)]
    folder = tmp_path_factory.mktemp("incremental") / "model"
    return build_tiny_model(folder, texts, hidden_size=32, heads=2, layers=1, vocab_size=290, max_length=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: Path, prefect_server: str) -> Task:
    """The run that all tests change."""
    task = Task(tmp_path_factory.mktemp("base"), model)
    task.write_prompts(range(PROMPTS))
    (task.folder / "reward.py").write_text(REWARD)
    (task.folder / "scale.py").write_text("SCALE = 2.0\n")
    task.run(until="shards")
    return task


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[Any, Any]]:
    """Real engines in their child processes, kept for the module."""
    running: dict[Any, Any] = {}
    yield running
    for engine in running.values():
        engine.close()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, engines: dict[Any, Any]) -> Counts:
    counts = Counts()

    def engine_for(config: Any, model: Any, log: Path) -> Any:
        key = config.model_dump_json(), model.model_dump_json()
        if key not in engines:
            engines[key] = open_engine(config, model)
        return CountingEngine(engines[key], counts.drawn)

    score = tasks.stages.rewards.Scorer.score

    def counted(self: Any, rows: Sequence[Any], known: Sequence[Any] | None = None) -> Any:
        fresh = [row for row, values in zip(rows, known or [{}] * len(rows), strict=True) if not values]
        counts.scored += [(row["prompt_id"], row["origin"], row["sample_index"]) for row in fresh]
        return score(self, rows, known)

    monkeypatch.setattr(tasks.stages.completions, "engine_for", engine_for)
    monkeypatch.setattr(tasks.stages.rewards.Scorer, "score", counted)
    return counts


@pytest.fixture
def task(base: Task, tmp_path: Path) -> Task:
    """A copy of the base run: folder, store and all."""
    shutil.copytree(base.folder, tmp_path / "task")
    return Task(tmp_path / "task", base.model)


def kept(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    """Whether every row that both runs have is the same in both, and there is any."""
    both = before.keys() & after.keys()
    return bool(both) and all(before[key] == after[key] for key in both)


def test_moved_folder_and_store_are_all_cached(task: Task, counts: Counts) -> None:
    for stage in list(STAGES)[: list(STAGES).index("shards") + 1]:
        assert task.preview()[stage]["parts_cached"] == task.preview()[stage]["parts_total"]

    results = task.run(until="shards")

    assert all(result.parts_computed == 0 for result in results.values())
    assert not counts.drawn
    assert not counts.scored


def test_appended_prompts_alone_are_sampled_and_scored(task: Task, counts: Counts) -> None:
    texts, rewards = task.texts(), task.rewards()
    old = plan_pipeline(task.config, task.store)["completions"].parts
    task.write_prompts(range(PROMPTS + 10))

    planned = task.preview()
    results = task.run()

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


def test_removed_prompts_cost_nothing(task: Task, counts: Counts) -> None:
    texts, rewards = task.texts(), task.rewards()
    task.write_prompts([number for number in range(PROMPTS) if number not in {3, 17, 18}])
    reasons = task.preview()["rewards"]["reasons"]
    assert any(reason.startswith("completions is written anew (") for reason in reasons)

    task.run()

    new = task.texts()
    assert not counts.drawn
    assert not counts.scored
    assert len(new) == (PROMPTS - 3) * NUM_REF
    assert kept(texts, new)
    assert kept(rewards, task.rewards())


def test_reordered_prompts_cost_nothing(task: Task, counts: Counts) -> None:
    texts, rewards = task.texts(), task.rewards()
    numbers = list(range(PROMPTS))
    random.Random(1).shuffle(numbers)
    task.write_prompts(numbers)

    task.run()

    assert not counts.drawn
    assert not counts.scored
    assert task.texts() == texts
    assert task.rewards() == rewards


def test_raised_num_ref_draws_only_the_new_samples(task: Task, counts: Counts) -> None:
    texts, rewards = task.texts(), task.rewards()
    task.changes = {"completions.num_ref": 7}

    planned = task.preview()
    results = task.run()

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

    task.run()

    assert {index for _, index in counts.drawn} == {4}
    assert len(counts.drawn) == len(counts.scored) == PROMPTS
    assert kept(texts, task.texts())


def test_lowered_num_ref_draws_nothing(task: Task, counts: Counts) -> None:
    texts, rewards = task.texts(), task.rewards()
    task.changes = {"completions.num_ref": 3}

    task.run()

    assert not counts.drawn
    assert not counts.scored
    assert task.texts() == {key: value for key, value in texts.items() if key[1] < 3}
    assert task.rewards() == {key: value for key, value in rewards.items() if key[1] < 3}


@pytest.mark.parametrize("changes", [{"completions.samples_per_part": 3}, {"run.part_size": 16}])
def test_another_cut_draws_and_scores_nothing(task: Task, counts: Counts, changes: dict[str, Any]) -> None:
    texts, rewards = task.texts(), task.rewards()
    task.changes = changes

    results = task.run()

    assert results["completions"].parts_computed == 0, "a finished artifact keeps its cut"
    assert not counts.drawn
    assert not counts.scored
    assert task.texts() == texts
    assert task.rewards() == rewards


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
    task.run()

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
    task.run()

    assert planned["completions"]["reasons"] == []
    assert planned["rewards"]["parts_cached"] == 0
    assert "version" in " ".join(planned["rewards"]["reasons"])
    assert not counts.drawn
    assert len(counts.scored) == PROMPTS * NUM_REF
    assert task.rewards() == rewards


def test_sampling_settings_draw_everything_anew(task: Task, counts: Counts) -> None:
    task.changes = {"completions.sampling.temperature": 0.5}

    planned = task.preview()
    task.run(until="completions")

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

    done = task.run(until="quantiles")["quantiles"]

    assert (done.parts_computed, done.rows) == (0, PROMPTS)
    assert not task.preview()["quantiles"]["reasons"]


def test_ties_redo_quantiles_and_shards_but_no_forward_pass(task: Task, counts: Counts) -> None:
    before = {row["prompt_id"]: row for row in task.rows("shards")}
    task.changes = {"quantiles.ties": "mid"}

    planned = task.preview()
    task.run(until="shards")

    assert planned["rewards"]["reasons"] == []
    assert planned["quantiles"]["reasons"] == ["quantiles.ties changed from weak to mid"]
    assert planned["quantiles"]["parts_cached"] == planned["shards"]["parts_cached"] == 0
    assert "quantiles is computed anew" in planned["shards"]["reasons"]
    assert not counts.drawn
    assert not counts.scored
    records = plan_pipeline(task.config, task.store, until="shards")["shards"].records.values()
    assert sum(record.metadata["reused"] for record in records) == PROMPTS * NUM_REF
    after = {row["prompt_id"]: row for row in task.rows("shards")}
    assert {key: row["ref_logprob"] for key, row in after.items()} == {
        key: row["ref_logprob"] for key, row in before.items()
    }
    assert any(after[key]["quantile_reward"] != before[key]["quantile_reward"] for key in before)


def test_raised_num_ref_computes_only_new_reference_logprobs(task: Task, counts: Counts) -> None:
    before = {row["prompt_id"]: row for row in task.rows("shards")}
    task.changes = {"completions.num_ref": 6, "quantiles.num_completions": 4}

    task.run(until="shards")

    records = plan_pipeline(task.config, task.store, until="shards")["shards"].records.values()
    assert sum(record.metadata["reused"] for record in records) == PROMPTS * NUM_REF
    for row in task.rows("shards"):
        assert row["ref_logprob"] == before[row["prompt_id"]]["ref_logprob"]
        assert row["num_ref"] == 5


def test_forced_stage_gives_the_same_rows_and_what_follows_stays(task: Task, counts: Counts) -> None:
    texts = task.texts()
    from prefect import flow

    @flow(name="forced")
    def forced() -> Any:
        return run_stage("completions", task.config, task.store.url, force=True)

    result = forced()

    assert result.parts_cached == 0
    assert len(counts.drawn) == PROMPTS * NUM_REF
    assert task.texts() == texts
    assert task.preview()["rewards"]["reasons"] == [], (
        "the same bytes came, so what was made from them still holds"
    )


def test_changed_policy_does_not_stumble_over_the_policy_before(task: Task, counts: Counts) -> None:
    task.changes = {"policy.max_steps": 1, "policy.prompts_per_step": 4}
    task.run(until="policy")
    task.changes["quantiles.ties"] = "strict"  # the same family of policies, other shards

    results = task.run(until="policy")

    assert results["policy"].parts_computed == 1
    assert len({record.fingerprint for record in task.store.family_parts("policy", policy_family(task))}) == 2


def policy_family(task: Task) -> str:
    return plan_pipeline(task.config, task.store, until="policy")["policy"].family


def trained(task: Task, config: PipelineConfig) -> PartRecord:
    """The policy's record; its computation runs in this process."""
    plan = plan_pipeline(config, task.store, until="policy")
    assert all(plan[stage].complete for stage in ("completions", "rewards", "quantiles", "shards"))
    results = [*compute_policy(STAGES["policy"].work(config, task.store, plan["policy"].parts))]
    assert isinstance(results[-1], PartRecord)
    return results[-1]


def file_of(task: Task, record: PartRecord, name: str) -> Path:
    (key,) = (file.key for file in record.files if file.name == name)
    path = task.store.local_path(key)
    assert path is not None
    return path


def test_every_loss_trains_on_the_same_shards(task: Task) -> None:
    """Each is a policy of its own, of the same parents, and starts at the value that its definition has at the reference."""
    policies, first = {}, {}
    for loss in ("qrpo", "dpo", "rebel", "simpo", "sft"):
        task.changes = {"policy.loss": loss, "policy.max_steps": 2, "policy.prompts_per_step": 8}
        policies[loss] = trained(task, task.config)
        metrics = polars.read_parquet(file_of(task, policies[loss], "metrics.parquet")).drop_nulls("loss")
        assert metrics["step"].to_list() == [1, 2]
        assert metrics["grad_norm"].min() > 0  # type: ignore[operator]
        first[loss] = metrics["loss"][0]

    assert len({record.fingerprint for record in policies.values()}) == 5
    assert len({json.dumps(sorted(record.parents)) for record in policies.values()}) == 1
    assert first["dpo"] == pytest.approx(math.log(2), rel=1e-4)
    assert all(math.isfinite(loss) for loss in first.values())


def test_policy_on_two_processes_passes_on_their_failure_and_is_that_of_one(
    task: Task, base: Task, tmp_path: Path
) -> None:
    shutil.copytree(base.folder, tmp_path / "alone")
    alone = Task(tmp_path / "alone", base.model)
    settings = {"policy.max_steps": 2, "policy.prompts_per_step": 8}
    alone.changes = settings
    task.changes = {**settings, "policy.processes": 2, "policy.lora": {"target_modules": ["no_such_layer"]}}
    with pytest.raises(ConfigError, match=r"policy\.lora\.target_modules: .*no_such_layer"):
        task.run(until="policy")
    task.changes = {**settings, "policy.processes": 2}
    task.run(until="policy")
    record = trained(alone, alone.config)

    two = task.store.part(record.key)
    assert two is not None
    metrics = [
        polars.read_parquet(file_of(each, part, "metrics.parquet")).drop_nulls("loss")
        for each, part in ((task, two), (alone, record))
    ]
    for name in ("step", "loss", "grad_norm"):
        assert metrics[0][name].to_list() == pytest.approx(metrics[1][name].to_list(), rel=1e-3)
