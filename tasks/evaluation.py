"""The `evaluation` stage: fresh samples of policy and reference on held-out prompts, scored and compared.

Both models answer the same prompts, `num_samples` times each, with seeds that no training sample has. Rewards become quantiles under the
reference rewards of the `quantiles` stage, which neither model's fresh samples are part of; ties count half, so that the reference's own mean
is 0.5 whatever the rewards look like.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from pydantic import Field

from qrpo.config import Section, keyed
from qrpo.quantiles import quantile_rewards
from storage import PartKey, PartRecord, Store, fingerprint
from storage.tables import SCHEMAS
from tasks.completions import sample_requests, sample_row
from tasks.engines import close_engine, engine_for
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.prompts import prompt_parts, prompt_rows
from tasks.reference import model_for, reference_identity, reference_inputs, reference_parent
from tasks.rewards import Scorer, reward_settings
from tasks.shards import LogprobScorer
from tasks.work import Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["EvaluationConfig", "Samples", "compute", "plan", "sample", "summary"]

VERSION = 1


class EvaluationConfig(Section):
    """Policy against reference on held-out prompts."""

    num_samples: int = Field(4, ge=1)
    """Fresh samples of each model per prompt."""


def plan(config: "PipelineConfig", plans: Mapping[str, StagePlan], store: Store) -> StagePlan:
    """One part for every eval prompts part; none where no prompt is held out or nothing is trained."""
    completions = config.completions
    rewards, reward_identity = reward_settings(config)
    settings = {
        **keyed(config.evaluation),
        "seed": config.seed,
        "engine": keyed(completions.engine),
        "sampling": keyed(completions.sampling),
        "rewards": rewards,
    }
    outside = {"model": reference_identity(config, plans), "rewards": reward_identity}
    family = make_family("evaluation", VERSION, settings, outside)
    policy = plans["policy"]
    by_prompts = {part.slice["prompts"]: part for part in plans["quantiles"].parts}
    parts = []
    for prompts in prompt_parts(plans, "eval") if policy.parts else ():
        quantiles = by_prompts[prompts.key.fingerprint]
        key = PartKey(
            "evaluation", family, fingerprint([family, policy.fingerprint, quantiles.key.fingerprint])
        )
        inputs = (prompts.key, quantiles.key, *(part.key for part in policy.parts), *reference_inputs(plans))
        parts.append(PartPlan(key, inputs, {"prompts": prompts.key.fingerprint, "split": "eval"}))
    parents = {
        "policy": policy.fingerprint,
        "quantiles": plans["quantiles"].fingerprint,
        **reference_parent(plans),
    }
    return StagePlan("evaluation", family, settings, outside, tuple(parts), parents)


@dataclass(frozen=True)
class Samples:
    """Fresh samples of both models: rows to score, and the prompts that could not be asked with the reason."""

    rows: list[dict[str, Any]]
    refused: dict[str, str]


def sample(work: Work) -> Samples:
    """Fresh samples of both models for the group's prompts, one model's engine after the other's."""
    prompts = [row for part in work.parts for row in prompt_rows(work, part, "messages").values()]
    wanted = {prompt["prompt_id"]: range(work.config.evaluation.num_samples) for prompt in prompts}
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for name in ("policy", "reference"):
        model = model_for(work, work.parts[0], stage=name)
        engine = engine_for(work.config.completions.engine, model, work.log)
        requests, reasons = sample_requests(engine, model, prompts, wanted, work.config, f"evaluation/{name}")
        refused |= reasons
        tokens = {request.key: list(request.prompt_token_ids) for request in requests}
        for prompt_id, samples in engine.sample(requests, work.config.completions.sampling):
            asked = {"prompt_token_ids": tokens[prompt_id], "model": name}
            rows += [{**sample_row(prompt_id, drawn), **asked} for drawn in samples]
        close_engine()
    return Samples(rows, refused)


def compute(work: Work, samples: Samples) -> Iterator[PartRecord]:
    """Score the samples of `sample` with the rewards and both models, and commit. Runs in a child process."""
    started = time.monotonic()
    rows = [{**row, "completion_token_ids": [row["token_ids"]]} for row in samples.rows]
    for stage, column in (("policy", "policy_logprob"), ("reference", "ref_logprob")):
        LogprobScorer(model_for(work, work.parts[0], stage=stage), work.config).score(rows, column)
    for row in rows:
        row["policy_logprob"], row["ref_logprob"] = row["policy_logprob"][0], row["ref_logprob"][0]
    with Scorer(work.config, work.log, work.store) as scorer:
        for part in work.parts:
            yield _score_part(work, part, Samples(rows, samples.refused), scorer, started)


def _score_part(work: Work, part: PartPlan, samples: Samples, scorer: Scorer, started: float) -> PartRecord:
    prompts = prompt_rows(work, part, "messages", "conversational", "metadata")
    quantiles = work.store.read_part(work.input(part, "quantiles"), columns=["prompt_id", "ref_rewards"])
    references = {row["prompt_id"]: row["ref_rewards"] for row in quantiles.to_pylist()}
    own = [{**prompts[row["prompt_id"]], **row} for row in samples.rows if row["prompt_id"] in prompts]
    own.sort(key=lambda row: (row["prompt_id"], row["model"], row["sample_index"]))
    refused = {prompt_id: reason for prompt_id, reason in samples.refused.items() if prompt_id in prompts}
    rejects = [{"key": key, "reason": reason, "prompt_id": key} for key, reason in refused.items()]
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
        part, pa.Table.from_pylist(kept, schema=SCHEMAS["evaluation"]), started=started, rejects=rejects
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
    """The comparison over all parts, with what the closed-form optimum promises for this transform and beta."""
    from qrpo.evaluation import summarise

    table = store.scan([stage_plan.records[part.key.fingerprint] for part in stage_plan.parts]).collect()
    compared = summarise(
        table.to_arrow(), config.policy, num_ref=config.completions.num_ref, seed=config.seed
    )
    return cast("dict[str, Any]", _json_numbers(compared))


def _json_numbers(value: Any) -> Any:
    """The same with null for what JSON cannot say: a standard error from a single prompt."""
    if isinstance(value, dict):
        return {key: _json_numbers(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
