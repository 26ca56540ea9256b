"""The `evaluation` stage: fresh samples of every model on held-out prompts, scored and compared.

The policy, the reference and any others answer the same prompts, `num_samples` times each, with seeds that no training sample has. A part is
one model on one prompts part, so the reference's answers are drawn once for all policies that are compared with it. Rewards become
quantiles under the reference rewards of the `quantiles` stage, which no fresh sample is part of; ties count half, so that the reference's own
mean is 0.5 whatever the rewards look like.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from qrpo.config import Section, keyed
from qrpo.data.chat import load_tokenizer
from qrpo.errors import ConfigError
from qrpo.method.quantiles import quantile_rewards
from qrpo.models import ModelConfig, model_identity
from storage import PartKey, PartRecord, Store, fingerprint
from storage.checks import at_least, finite, in_range, lists_agree, rule
from storage.table import Table, column
from tasks.engines import close_engine, engine_for
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.stages.completions import sample_requests, sample_row
from tasks.stages.prompts import prompt_parts, prompt_rows
from tasks.stages.reference import model_for, reference_identity, reference_inputs, reference_parent
from tasks.stages.rewards import Scorer, reward_settings
from tasks.stages.shards import LogprobScorer
from tasks.work import Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["TABLE", "EvaluationConfig", "Samples", "checkpoint_model", "compute", "plan", "sample", "summary"]

VERSION = 3

TABLE = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column("model", pa.string()),
            column("sample_index", pa.int32()),
            column("text", pa.string()),
            column("token_ids", pa.list_(pa.int32())),
            column("finish_reason", pa.string(), null=True),
            column("reward", pa.float32(), null=True),
            column("quantile_reward", pa.float32(), null=True),
            column("model_logprob", pa.float32(), null=True),
            column("ref_logprob", pa.float32(), null=True),
            column("model_token_logprobs", pa.list_(pa.float32()), null=True),
            column("ref_token_logprobs", pa.list_(pa.float32()), null=True),
        ]
    ),
    key=("prompt_id", "model", "sample_index"),
    checks=(
        rule("must name its model", lambda rows: pc.equal(rows["model"], "")),
        at_least("sample_index", 0),
        at_least("token_ids", 0),
        lists_agree("token_ids", "model_token_logprobs", "ref_token_logprobs"),
        finite("reward", "model_logprob", "ref_logprob"),
        in_range("quantile_reward", 0, 1),
    ),
)


class EvaluationConfig(Section):
    """Policy against reference on held-out prompts."""

    num_samples: int = Field(4, ge=1)
    """Fresh samples of each model per prompt."""
    models: dict[str, ModelConfig] = Field(default_factory=dict, json_schema_extra={"fingerprint": False})
    """More models to compare with the reference, by name: checkpoints, other runs' policies. Naming one computes only its own."""

    checkpoints: tuple[int, ...] = Field((), json_schema_extra={"fingerprint": False})
    """Steps of the policy's training, of those that `policy.checkpoint_steps` keeps, whose models are compared too, as `step-N`."""

    @field_validator("models")
    @classmethod
    def _usable_names(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in models:
            taken = name in ("policy", "reference") or re.fullmatch(r"step-\d+", name)
            if taken or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
                raise ValueError(
                    f"{name!r} cannot name a model: use letters, digits, dots, dashes, and not `policy`, `reference` or `step-N`"
                )
        return models


def plan(config: "PipelineConfig", plans: Mapping[str, StagePlan], store: Store) -> StagePlan:
    """One part for every model and eval prompts part; none where no prompt is held out or nothing is trained."""
    completions = config.completions
    rewards, reward_identity = reward_settings(config)
    settings = {
        **keyed(config.evaluation),
        "seed": config.seed,
        "engine": keyed(completions.engine),
        "sampling": keyed(completions.sampling),
        "rewards": rewards,
        "dtype": config.policy.dtype,
    }
    outside = {"model": reference_identity(config, plans), "rewards": reward_identity}
    family = make_family("evaluation", VERSION, settings, outside)
    policy = plans["policy"]
    others = {name: model_identity(model) for name, model in config.evaluation.models.items()}
    on_the_way = {f"step-{step}": [policy.fingerprint, step] for step in config.evaluation.checkpoints}
    models = {"policy": policy.fingerprint, "reference": None, **on_the_way, **others}
    by_prompts = {part.slice["prompts"]: part for part in plans["quantiles"].parts}
    parts = []
    for name, identity in models.items() if policy.parts else ():
        for prompts in prompt_parts(plans, "eval"):
            quantiles = by_prompts[prompts.key.fingerprint]
            key = PartKey(
                "evaluation", family, fingerprint([family, name, identity, quantiles.key.fingerprint])
            )
            trained = [part.key for part in policy.parts] if name == "policy" or name in on_the_way else []
            inputs = (prompts.key, quantiles.key, *trained, *reference_inputs(plans))
            slice_ = {"prompts": prompts.key.fingerprint, "split": "eval", "model": name}
            parts.append(PartPlan(key, inputs, slice_))
    parents = {
        "policy": policy.fingerprint,
        "quantiles": plans["quantiles"].fingerprint,
        **reference_parent(plans),
    }
    outside |= {"models": others} if others else {}
    return StagePlan("evaluation", family, settings, outside, tuple(parts), parents)


@dataclass(frozen=True)
class Samples:
    """Fresh samples: rows to score, and the reasons why a prompt could not be asked, by (model, prompt)."""

    rows: list[dict[str, Any]]
    refused: dict[tuple[str, str], str]


def sample(work: Work) -> Samples:
    """Fresh samples for the group's parts, one model's engine after the other's."""
    rows: list[dict[str, Any]] = []
    refused: dict[tuple[str, str], str] = {}
    for name, parts in _by_model(work).items():
        prompts = [row for part in parts for row in prompt_rows(work, part, "messages").values()]
        wanted = {prompt["prompt_id"]: range(work.config.evaluation.num_samples) for prompt in prompts}
        model = _model(work, parts[0])
        engine = engine_for(work.config.completions.engine, model, work.log)
        requests, reasons = sample_requests(engine, model, prompts, wanted, work.config, f"evaluation/{name}")
        refused |= {(name, prompt_id): reason for prompt_id, reason in reasons.items()}
        tokens = {request.key: list(request.prompt_token_ids) for request in requests}
        for prompt_id, samples in engine.sample(requests, work.config.completions.sampling):
            asked = {"prompt_token_ids": tokens[prompt_id], "model": name}
            rows += [{**sample_row(prompt_id, drawn, name), **asked} for drawn in samples]
        close_engine()
    return Samples(rows, refused)


def compute(work: Work, samples: Samples) -> Iterator[PartRecord]:
    """Score the samples of `sample` with the rewards and their models, and commit. Runs in a child process."""
    started = time.monotonic()
    rows = [{**row, "completion_token_ids": [row["token_ids"]]} for row in samples.rows]
    _score_logprobs(work, rows)
    with Scorer(work.config, work.log, work.store) as scorer:
        for part in work.parts:
            yield _score_part(work, part, Samples(rows, samples.refused), scorer, started)


def _by_model(work: Work) -> dict[str, list[PartPlan]]:
    parts: dict[str, list[PartPlan]] = {}
    for part in work.parts:
        parts.setdefault(part.slice["model"], []).append(part)
    return parts


def _model(work: Work, part: PartPlan) -> ModelConfig:
    name = part.slice["model"]
    step = name.removeprefix("step-")
    if name in work.config.evaluation.models:
        return work.config.evaluation.models[name]
    return (
        model_for(work, part, stage=name)
        if step == name
        else checkpoint_model(model_for(work, part, "policy"), int(step))
    )


def checkpoint_model(policy: ModelConfig, step: int) -> ModelConfig:
    """The model of a step of the training that made the policy; ConfigError where its folder does not keep that one."""
    folder = Path(policy.path) / "checkpoints"
    if not (folder / str(step)).is_dir():
        kept = ", ".join(sorted((path.name for path in folder.glob("*")), key=int)) or "none"
        raise ConfigError(
            f"evaluation.checkpoints: the policy keeps no checkpoint of step {step}; its checkpoints: {kept}. "
            "policy.checkpoint_steps says which are kept, in a training run of their own"
        )
    return policy.model_copy(update={"path": str(folder / str(step))})


def _score_logprobs(work: Work, rows: Sequence[dict[str, Any]]) -> None:
    """Log-probabilities of every sample and its tokens under the model that drew it and under the reference.

    All stay unknown for a model whose tokens are not the reference's.
    """
    reference = model_for(work, work.parts[0])
    vocabulary = load_tokenizer(reference).get_vocab()
    comparable: list[dict[str, Any]] = []
    for name, parts in _by_model(work).items():
        own, model = [row for row in rows if row["model"] == name], _model(work, parts[0])
        if own and name in work.config.evaluation.models and load_tokenizer(model).get_vocab() != vocabulary:
            continue
        comparable += own
        if own and name != "reference":
            LogprobScorer(model, work.config).score_tokens(own, "model_token_logprobs")
    if comparable:
        LogprobScorer(reference, work.config).score_tokens(comparable, "ref_token_logprobs")
    for row in comparable:
        row.setdefault("model_token_logprobs", row["ref_token_logprobs"])
        row["model_logprob"], row["ref_logprob"] = (
            sum(row["model_token_logprobs"]),
            sum(row["ref_token_logprobs"]),
        )


def _score_part(work: Work, part: PartPlan, samples: Samples, scorer: Scorer, started: float) -> PartRecord:
    prompts = prompt_rows(work, part, "messages", "conversational", "metadata")
    quantiles = work.store.read_part(work.input(part, "quantiles"), columns=["prompt_id", "ref_rewards"])
    references = {row["prompt_id"]: row["ref_rewards"] for row in quantiles.to_pylist()}
    name = part.slice["model"]
    own = [
        {**prompts[row["prompt_id"]], **row}
        for row in samples.rows
        if row["model"] == name and row["prompt_id"] in prompts
    ]
    own.sort(key=lambda row: (row["prompt_id"], row["sample_index"]))
    rejects = [
        {"key": f"{prompt_id}/{name}", "reason": reason, "prompt_id": prompt_id}
        for (model, prompt_id), reason in samples.refused.items()
        if model == name and prompt_id in prompts
    ]
    kept = []
    for row, score in zip(own, scorer.score(own), strict=True):
        reason = score.error
        if reason is None and row["prompt_id"] not in references:
            reason = "the prompt has no reference rewards"
        if reason is None:
            kept.append({**row, "reward": score.reward})
        else:
            key = f"{row['prompt_id']}/{row['model']}/{row['sample_index']}"
            rejects.append({"key": key, "reason": reason, "prompt_id": row["prompt_id"]})
    for row, quantile in zip(kept, _quantiles(kept, references), strict=True):
        row["quantile_reward"] = quantile
    return work.commit(
        part,
        pa.Table.from_pylist(kept, schema=TABLE.schema),
        table=TABLE,
        started=started,
        rejects=rejects,
    )


def _quantiles(rows: Sequence[Mapping[str, Any]], references: Mapping[str, Sequence[float]]) -> list[float]:
    """The quantile of every row's reward among its prompt's references; rows of one prompt stand together."""
    counts = Counter(row["prompt_id"] for row in rows)
    refs = [np.asarray(references[prompt_id], dtype=np.float32) for prompt_id in counts]
    quantiles = quantile_rewards(
        np.array([row["reward"] for row in rows], dtype=np.float32),
        np.concatenate([*refs, np.empty(0, dtype=np.float32)]),
        offsets=np.cumsum([0, *counts.values()]),
        ref_offsets=np.cumsum([0, *map(len, refs)]),
        ties="mid",
    )
    return [float(quantile) for quantile in quantiles]


def summary(config: "PipelineConfig", store: Store, stage_plan: StagePlan) -> dict[str, Any]:
    """The comparison over all parts, with what QRPO's closed-form optimum promises for this transform and beta."""
    from qrpo.evaluation.summary import COLUMNS, summarise

    parts = [stage_plan.records[part.key.fingerprint] for part in stage_plan.parts]
    table = store.scan(parts).select(COLUMNS).collect()
    promising = config.policy if config.policy.loss == "qrpo" else None
    return summarise(table.to_arrow(), promising, num_ref=config.completions.num_ref, seed=config.seed)
