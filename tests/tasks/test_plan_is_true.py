"""For every field of the configuration: what `qrpo plan` says after a change is what the run then does.

The fields are read from the configuration's model, so a new setting cannot be forgotten: it fails here until a changed value is known.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import tasks.stages.completions
import tasks.stages.shards
from qrpo.config import Section, is_execution_option
from qrpo.data.chat import encode_prompt
from tasks.planner import plan_pipeline
from tasks.stage import setting_paths
from tasks.stages import STAGE_NAMES, STAGES
from tests.support.pipeline import TinyPipeline, fields_of

pytestmark = pytest.mark.slow

# Changed values that do not follow from the field's type; several keys where one alone is refused.
VALUES: dict[str, dict[str, Any]] = {
    **{
        f"{section}.{name}": {f"{section}.{name}": value}
        for section in ("policy", "reference.sft")
        for name, value in {
            "compile_layers": False,
            "gradient_checkpointing": True,
            "processes": 2,
            "report_to": ["tensorboard"],
            "lora": {"rank": 2},
        }.items()
    },
    **{
        path: {path: value}
        for path, value in {
            "completions.engine.enforce_eager": True,
            "completions.engine.device": "cpu",
            "completions.engine.dtype": "float32",
            "completions.engine.max_model_len": 60,
            "completions.sampling.stop": ["two"],
            "completions.sampling.stop_token_ids": [9],
            "completions.sampling.top_k": 5,
            "completions.num_ref": 6,
            "prompts.columns": {"prompt": "prompt"},
            "prompts.eval_fraction": 0.5,
            "prompts.limit": 20,
            "prompts.source_name": "other",
            "prompts.system_prompt": "Be short.",
            "quantiles.train_on": "both",
            "reference.model.dtype": "bfloat16",
            "rewards.0.name": "other",
            "rewards.0.version": "2",
            "policy.transform": "log",
            "policy.seed": 2,
        }.items()
    },
    "run.cluster": {"run.runner": "dask", "run.cluster": "tcp://127.0.0.1:1"},
    **{
        f"{section}.weights": {f"{section}.weights": "bfloat16", f"{section}.bf16": True}
        for section in ("policy", "reference.sft")
    },
    "policy.patience": {"policy.patience": 2, "policy.eval_fraction": 0.3},
    "policy.fsdp": {"policy.fsdp": True, "policy.processes": 2},
    "evaluation.checkpoints": {"evaluation.checkpoints": [1], "policy.checkpoint_steps": 1},
}
# Not tried: where things are (their content is the setting), what belongs to no artifact, and rounds, which need another run.
ELSEWHERE = {
    "name",
    "prompts.source",
    "prompts.eval_source",
    "reference.model.path",
    "reference.model.revision",
    "rewards.0.function",
    "rewards.0.kind",
    "completions.engine.kind",  # vllm: another engine, tested in other files
    "completions.engine.options",  # of vLLM
    "evaluation.models",
    "rounds.count",
    "rounds.num_completions",
    "rounds.learning_rate",
    "rounds.from_run",
    "compare.methods",
    "compare.seeds",
    "compare.select_by",
}
# Settings whose change gives the same rows here.
NO_EFFECT = {
    "prompts.columns",  # names the column that is read anyway
    "reference.model.trust_remote_code",  # a permission: the model's files are its identity
}
# Settings whose change is planned, and not run: each only trains another model. Those in RUN stand for them.
ONLY_PLANNED = ("policy.", "reference.sft.")
RUN = {"policy.beta", "policy.bf16", "reference.sft.learning_rate"}


def changed(path: str, section: type[Section], name: str, value: Any) -> dict[str, Any]:
    """Another valid value of a field."""
    if path in VALUES:
        return VALUES[path]
    annotation = section.model_fields[name].annotation
    options = get_args(annotation) if get_origin(annotation) is Literal else ()
    if options:
        return {path: next(option for option in options if option != value)}
    if isinstance(value, bool):
        return {path: not value}
    if isinstance(value, int):
        return {path: value + 1}
    if isinstance(value, float):
        return {path: value / 2 if value else 0.25}
    kinds = {kind for kind in get_args(annotation) if kind is not type(None)}
    if value is None and kinds & {int, float}:
        return {path: 2}
    raise AssertionError(f"{path}: say in VALUES what a changed value is")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, finished: TinyPipeline) -> TinyPipeline:
    """The finished run that every test changes."""
    return finished.copy(tmp_path_factory.mktemp("plan") / "base")


def all_fields() -> list[Any]:
    config = TinyPipeline(Path("folder"), Path("model")).config()
    fields = [field for field in fields_of(config) if field[0] not in ELSEWHERE]
    return [pytest.param(*field, id=field[0]) for field in fields]


FIELDS = all_fields()
OPTIONS = [field for field in FIELDS if is_execution_option(field.values[1], field.values[2])]
SETTINGS = [field for field in FIELDS if field not in OPTIONS]


@pytest.mark.parametrize(("path", "section", "name", "value"), OPTIONS)
def test_execution_option_is_free(
    base: TinyPipeline, drawn: list[Any], path: str, section: type[Section], name: str, value: Any
) -> None:
    """Nothing is computed again, and every row and weight is the same."""
    before, calls = base.config(), base.scored()
    after = base.config(changed(path, section, name, value))
    assert after != before

    planned = base.plan(after)
    results = base.run(after)

    assert all(stage["parts_cached"] == stage["parts_total"] for stage in planned.values())
    assert not any(stage["reasons"] for stage in planned.values())
    assert {result.parts_computed for result in results.values()} == {0}  # no training step either
    assert not drawn
    assert base.scored() == calls
    assert base.row_digests(after) == base.row_digests(before)
    assert base.weights(after) == base.weights(before)
    assert base.weights(after, "reference") == base.weights(before, "reference")


@pytest.mark.parametrize(("path", "section", "name", "value"), SETTINGS)
def test_plan_names_the_setting_and_its_cost(
    base: TinyPipeline,
    tmp_path: Path,
    drawn: list[Any],
    path: str,
    section: type[Section],
    name: str,
    value: Any,
) -> None:
    pipeline = base.copy(tmp_path / "copy")
    changes = changed(path, section, name, value)
    config = pipeline.config(changes)

    planned = pipeline.plan(config)

    todo = [stage for stage in STAGE_NAMES if planned[stage]["parts_cached"] < planned[stage]["parts_total"]]
    idle = path in NO_EFFECT or path.rpartition(".")[2] in section_at(config, path).idle_fields()
    assert bool(todo) != idle, "a setting without effect changes nothing, any other something"
    for stage in todo:
        named = [key for key in changes if reads(stage, key)]
        words = " / ".join(planned[stage]["reasons"])
        assert all(f"{key}" in words for key in named), f"{stage}: {words}"
        assert named or any(why in words for why in ("is computed anew", "is written anew", "changed"))
    for stage in STAGE_NAMES:
        if stage not in todo:
            assert not planned[stage]["reasons"] or planned[stage]["parts_total"] == 0
    if path.startswith(ONLY_PLANNED) and path not in RUN:
        return

    results = pipeline.run(config)

    for stage, result in results.items():
        assert result.parts_cached == planned[stage]["parts_cached"], stage
        if planned[stage]["rows"] is not None:
            rows = planned[stage]["rows"]
            assert (result.rows_computed, result.rows_reused) == (rows["compute"], rows["reuse"]), stage
    evaluated = len(drawn) - results["completions"].rows_computed
    evaluated += len(pipeline.scored()) - results["rewards"].rows_computed
    assert results["evaluation"].rows_computed == evaluated, "what the engines and the reward were asked for"
    assert {result.parts_computed for result in pipeline.run(config).values()} == {0}


def section_at(config: Any, path: str) -> Section:
    found: Any = config
    for step in path.split(".")[:-1]:
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    assert isinstance(found, Section)
    return found


def reads(stage: str, key: str) -> bool:
    """Whether a stage reads this key of the configuration."""
    paths = setting_paths(STAGES[stage].settings).values()
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def test_new_weight_and_new_reward_score_only_what_was_never_scored(
    base: TinyPipeline, tmp_path: Path, drawn: list[Any]
) -> None:
    pipeline = base.copy(tmp_path / "copy")
    letters = {"kind": "function", "name": "letters", "function": f"{pipeline.folder / 'reward.py'}:letters"}
    length = {"kind": "function", "name": "length", "function": f"{pipeline.folder / 'reward.py'}:length"}

    pipeline.run(pipeline.config({"rewards.0.weight": 0.5}), until="rewards")
    assert pipeline.scored() == []
    added = pipeline.config({"rewards": [{**length, "weight": 2.0}, letters]})
    planned = pipeline.plan(added)["rewards"]["rows"]
    result = pipeline.run(added, until="rewards")["rewards"]

    assert pipeline.scored() == ["letters"] * result.rows
    assert (planned["compute"], planned["reuse"]) == (result.rows, result.rows)
    rows = {
        (row["prompt_id"], row["sample_index"]): row
        for record in pipeline.store.find_parts(
            [part.key for part in plan_of(pipeline, added, "rewards")]
        ).values()
        for row in pipeline.store.read_part(record).to_pylist()
    }
    for row in rows.values():
        values = {item["name"]: item["value"] for item in row["components"]}
        assert row["reward"] == pytest.approx(2.0 * values["length"] + values["letters"])
    assert not drawn


def plan_of(pipeline: TinyPipeline, config: Any, stage: str) -> Any:
    return plan_pipeline(config, pipeline.store)[stage].parts


def test_order_of_training_does_not_depend_on_the_cut(
    base: TinyPipeline, tmp_path: Path, tiny_model: Path, drawn: list[Any]
) -> None:
    """Two stores that were filled in different parts train on the same rows in the same order."""
    other = TinyPipeline.create(tmp_path / "other", tiny_model)
    cut = other.config({"run.part_size": 3, "completions.samples_per_part": 3})

    results = other.run(cut)

    assert results["shards"].parts_computed > len(plan_of(base, base.config(), "shards"))
    ours, theirs = base.row_digests(base.config()), other.row_digests(cut)
    assert {name: theirs[name] for name in ("prompts", "completions", "quantiles")} == {
        name: ours[name] for name in ("prompts", "completions", "quantiles")
    }
    assert other.weights(cut, "reference") == base.weights(base.config(), "reference")
    assert other.losses(cut) == pytest.approx(base.losses(base.config()), rel=1e-4)


def test_a_run_plans_each_stage_once(
    tmp_path: Path, tiny_model: Path, prefect_server: str, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import pipeline

    planned = []

    def counted(stage: Any) -> Any:
        def plan(settings: Any, upstream: Any) -> Any:
            planned.append(stage.name)
            return stage.plan(settings, upstream)

        return replace(stage, plan=plan)

    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, counted(stage))
    other = TinyPipeline.create(tmp_path / "other", tiny_model, prompts=8)
    pipeline(other.config(), other.store.url)
    assert tuple(planned) == STAGE_NAMES


def test_every_stage_uses_the_tokens_that_were_sampled_from(
    base: TinyPipeline, tmp_path: Path, tiny_model: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat template writes the time in microseconds, so no two renderings of a prompt are the same."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y %f') }}" + template)
    pipeline = TinyPipeline.create(tmp_path / "dated", model)
    rendered: list[str] = []

    def counted(tokenizer: Any, messages: Any, *tools: Any) -> list[int]:
        rendered.append(messages[-1]["content"])
        return encode_prompt(tokenizer, messages, *tools)

    for stage in (tasks.stages.completions, tasks.stages.shards):
        monkeypatch.setattr(stage, "encode_prompt", counted)
    changes = {"reference.sft": None, "quantiles.train_on": "both"}
    pipeline.run(pipeline.config(changes), until="shards")
    config = pipeline.config({**changes, "completions.num_ref": 6, "quantiles.num_completions": 5})

    pipeline.run(config)

    plans = plan_pipeline(config, pipeline.store)
    rows = {
        stage: pipeline.store.scan(plans[stage].records.values()).collect().to_dicts()
        for stage in ("completions", "shards", "evaluation")
    }
    assert rows["evaluation"]
    assert sorted(rendered) == sorted({f"count to {n}" for n in range(24)})
    sampled = [row for row in rows["completions"] if row["origin"] == "reference"]
    sampled_from = {row["prompt_id"]: row["prompt_token_ids"] for row in sampled}
    assert {row["sample_index"] for row in sampled} == set(range(6))
    for row in (*sampled, *rows["shards"]):
        assert row["prompt_token_ids"] == sampled_from[row["prompt_id"]]
    logprobs = {(row["prompt_id"], row["sample_index"]): row["sampled_logprob"] for row in sampled}
    compared = [
        (logprobs[row["prompt_id"], index], logprob)
        for row in rows["shards"]
        for origin, index, logprob in zip(row["origin"], row["sample_index"], row["ref_logprob"], strict=True)
        if origin == "reference"
    ]
    assert compared
    assert [theirs for _, theirs in compared] == pytest.approx([ours for ours, _ in compared], abs=1e-3)


def test_the_source_of_a_transform_is_part_of_the_policy(base: TinyPipeline, tmp_path: Path) -> None:
    source = tmp_path / "transform.py"
    source.write_text("def f(quantiles):\n    return 2.0 * quantiles\n")
    config = base.config({"policy.transform": f"{source}:f"})
    before = plan_pipeline(config, base.store)["policy"].fingerprint
    assert plan_pipeline(config, base.store)["policy"].fingerprint == before
    source.write_text("def f(quantiles):\n    return 3.0 * quantiles\n")
    assert plan_pipeline(config, base.store)["policy"].fingerprint != before
