"""The `evaluation` stage: fresh samples of every model on held-out prompts, scored and compared.

The policy, the reference and any others answer the same prompts, `num_samples` times each, with
seeds that no training sample has. A part is one model on one prompts part, so the reference's
answers are drawn once for all policies that are compared with it. Rewards become quantiles under
the reference rewards of the `quantiles` stage, which no fresh sample is part of; ties count half,
so that the reference's own mean is 0.5 whatever the rewards look like.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from qrpo.config import Section, keyed
from qrpo.data.chat import load_tokenizer
from qrpo.engines import EngineConfig
from qrpo.engines.sampling import SamplingConfig
from qrpo.method.quantiles import quantile_rewards
from qrpo.models import ModelConfig
from qrpo.rewards import RewardConfig
from qrpo.training.settings import PolicyConfig
from storage import PartRecord, Store, fingerprint
from storage.checks import at_least, finite, in_range, lists_agree, rule
from storage.table import Table, column
from tasks.engines import close_engine, engine_for
from tasks.models import known_identity
from tasks.plan import PartPlan, StagePlan, Upstream, make_family, part_key
from tasks.reuse import reusable_rows
from tasks.stage import RowReuse, Stage, setting
from tasks.stages.completions import (
    count_cut,
    engine_settings,
    prompt_tokens,
    remark_on_cut,
    sample_requests,
    sample_row,
)
from tasks.stages.policy import checkpoint_model
from tasks.stages.prompts import prompt_rows
from tasks.stages.reference import model_for
from tasks.stages.rewards import (
    TABLE as REWARDS,
)
from tasks.stages.rewards import (
    Scorer,
    input_digest,
    known_scores,
    missing_rewards,
    reward_gpus,
    reward_settings,
    sees_tokens,
)
from tasks.stages.shards import LogprobScorer
from tasks.work import Work

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
            column("reward", pa.float64(), null=True),
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
    """More models to compare with the reference, by name: checkpoints, other runs' policies. Naming
    one computes only its own."""

    checkpoints: tuple[int, ...] = Field((), json_schema_extra={"fingerprint": False})
    """Steps of the policy's training, of those that `policy.checkpoint_steps` keeps, whose models
    are compared too, as `step-N`."""

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


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    section: EvaluationConfig = setting("evaluation")
    model: ModelConfig = setting("reference.model")
    engine: EngineConfig = setting("completions.engine")
    sampling: SamplingConfig = setting("completions.sampling")
    num_ref: int = setting("completions.num_ref")
    rewards: tuple[RewardConfig, ...] = setting("rewards")
    policy: PolicyConfig = setting("policy")
    token_budget: int = setting("shards.token_budget")
    seed: int = setting("seed")


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """One part for each model and part of eval prompts; none where nothing is held out."""
    rewards, reward_identity = reward_settings(settings.rewards, upstream.store)
    hashed = {
        **keyed(settings.section),
        "seed": settings.seed,
        "engine": engine_settings(settings.engine, settings.model),
        "sampling": keyed(settings.sampling),
        "rewards": rewards,
        "dtype": settings.policy.dtype,
    }
    outside = {"model": upstream.reference_identity, "rewards": reward_identity}
    family = make_family("evaluation", VERSION, hashed, outside)
    policy = upstream["policy"]
    others = {name: _identity(model, upstream.store) for name, model in settings.section.models.items()}
    on_the_way = {f"step-{step}": [policy.fingerprint, step] for step in settings.section.checkpoints}
    models = {"policy": policy.fingerprint, "reference": None, **on_the_way, **others}
    quantiles_of = upstream["quantiles"].by_prompts()
    completions_of = upstream["completions"].by_prompts()
    parts = []
    for name, identity in models.items() if policy.parts else ():
        for prompts in upstream.prompt_parts("eval"):
            (quantiles,) = quantiles_of[prompts.key.fingerprint]
            key = part_key("evaluation", family, name, identity, quantiles.key.fingerprint)
            trained = [part.key for part in policy.parts] if name == "policy" or name in on_the_way else []
            # the first completions part has the prompts' tokens; another model has another template
            tokens = [part.key for part in completions_of[prompts.key.fingerprint][:1] if name not in others]
            inputs = (prompts.key, quantiles.key, *tokens, *trained, *upstream.reference_inputs)
            common = {"prompts": prompts.key.fingerprint, "split": "eval", "model": name}
            parts.append(PartPlan(key, inputs, {**common, "identity": fingerprint([identity])}))
    rows = {"eval": fingerprint([family, models, upstream["quantiles"].rows["eval"]])}
    parents = upstream.parents("policy", "quantiles", "reference")
    return StagePlan("evaluation", family, hashed, outside, tuple(parts), parents, rows)


def _identity(model: ModelConfig, store: Store) -> dict[str, Any]:
    identity = known_identity(model, store, "evaluation")
    return identity if model.dtype == "auto" else {**identity, "dtype": model.dtype}


@dataclass(frozen=True)
class Samples:
    """Samples to evaluate, and the reasons why a prompt could not be asked, by (model, prompt).

    `fresh` were drawn now. `kept` are rows of committed parts, with the log-probabilities they
    have.
    """

    fresh: list[dict[str, Any]]
    kept: list[dict[str, Any]]
    refused: dict[tuple[str, str], str]


def sample(work: Work[Settings]) -> Samples:
    """Samples for the parts, one engine at a time; draws only what no committed part has."""
    settings = work.settings
    samples = Samples([], [], {})
    for name, parts in _by_model(work).items():
        kept = [row for part in parts for row in _committed(work, part)]
        there = {(row["prompt_id"], row["sample_index"]) for row in kept}
        samples.kept.extend(kept)
        prompts = [row for part in parts for row in prompt_rows(work, part, "messages").values()]
        lacking = {
            prompt["prompt_id"]: [
                index
                for index in range(settings.section.num_samples)
                if (prompt["prompt_id"], index) not in there
            ]
            for prompt in prompts
        }
        wanted = {prompt_id: indices for prompt_id, indices in lacking.items() if indices}
        if wanted:
            _draw(work, name, [row for row in prompts if row["prompt_id"] in wanted], wanted, samples)
    return samples


def _committed(work: Work[Settings], part: PartPlan) -> list[dict[str, Any]]:
    rows = reusable_rows(work, part, on=["prompt_id", "sample_index"])
    if rows.is_empty():
        return []
    prompts = prompt_rows(work, part)
    rows = rows.unique(subset=["prompt_id", "sample_index"], keep="first", maintain_order=True)
    few = work.settings.section.num_samples
    return [row for row in rows.to_dicts() if row["prompt_id"] in prompts and row["sample_index"] < few]


def _draw(
    work: Work[Settings],
    name: str,
    prompts: Sequence[Mapping[str, Any]],
    wanted: Mapping[str, Sequence[int]],
    samples: Samples,
) -> None:
    settings = work.settings
    parts = _by_model(work)[name]
    model = _model(work, parts[0])
    engine = engine_for(settings.engine, model, work.log)
    known = prompt_tokens(work.store, [one for part in parts for one in work.inputs(part, "completions")])
    requests, reasons = sample_requests(
        engine, model, prompts, wanted, settings.sampling, settings.seed, f"evaluation/{name}", known
    )
    samples.refused.update({(name, prompt_id): reason for prompt_id, reason in reasons.items()})
    tokens = {request.key: list(request.prompt_token_ids) for request in requests}
    for prompt_id, drawn in engine.sample(requests, settings.sampling):
        asked = {"prompt_token_ids": tokens[prompt_id], "model": name}
        samples.fresh.extend({**sample_row(prompt_id, one, name), **asked} for one in drawn)
    close_engine()


def compute(work: Work[Settings], samples: Samples) -> Iterator[PartRecord]:
    """Score the samples with the rewards and their models, and commit. Runs in a child process."""
    started = time.monotonic()
    fresh = [{**row, "completion_token_ids": [row["token_ids"]]} for row in samples.fresh]
    _score_logprobs(work, fresh)
    samples = Samples(fresh, samples.kept, samples.refused)
    with Scorer(work.settings.rewards, work.log, work.store) as scorer:
        for part in work.parts:
            yield _score_part(work, part, samples, scorer, started)


def _by_model(work: Work[Settings]) -> dict[str, list[PartPlan]]:
    parts: dict[str, list[PartPlan]] = {}
    for part in work.parts:
        parts.setdefault(part.slice["model"], []).append(part)
    return parts


def _model(work: Work[Settings], part: PartPlan) -> ModelConfig:
    name = part.slice["model"]
    step = name.removeprefix("step-")
    if name in work.settings.section.models:
        return work.settings.section.models[name]
    if step == name:
        return model_for(work, part, work.settings.model, stage=name)
    return checkpoint_model(model_for(work, part, work.settings.model, "policy"), int(step))


def _score_logprobs(work: Work[Settings], rows: Sequence[dict[str, Any]]) -> None:
    """Log-probabilities of every sample and its tokens under the model that drew it and under the
    reference.

    All stay unknown for a model whose tokens are not the reference's.
    """
    if not rows:
        return
    settings = work.settings
    reference = model_for(work, work.parts[0], settings.model)
    vocabulary = load_tokenizer(reference).get_vocab()
    comparable: list[dict[str, Any]] = []

    def score(model: ModelConfig, rows: Sequence[dict[str, Any]], column: str) -> None:
        with closing(LogprobScorer(model, settings.policy.dtype, settings.token_budget)) as scorer:
            scorer.score_tokens(rows, column)

    for name, parts in _by_model(work).items():
        own, model = [row for row in rows if row["model"] == name], _model(work, parts[0])
        if own and name in settings.section.models and load_tokenizer(model).get_vocab() != vocabulary:
            continue
        comparable += own
        if own and name != "reference":
            score(model, own, "model_token_logprobs")
    if comparable:
        score(reference, comparable, "ref_token_logprobs")
    for row in comparable:
        row.setdefault("model_token_logprobs", row["ref_token_logprobs"])
        row["model_logprob"] = sum(row["model_token_logprobs"])
        row["ref_logprob"] = sum(row["ref_token_logprobs"])


_SCHEMA = TABLE.schema.append(REWARDS.schema.field("components")).append(
    pa.field("input_digest", pa.string())
)


def _score_part(
    work: Work[Settings], part: PartPlan, samples: Samples, scorer: Scorer, started: float
) -> PartRecord:
    settings, name = work.settings, part.slice["model"]
    prompts = prompt_rows(work, part, "messages", "conversational", "metadata")
    quantiles = work.store.read_part(work.input(part, "quantiles"), columns=["prompt_id", "ref_rewards"])
    references = {row["prompt_id"]: row["ref_rewards"] for row in quantiles.to_pylist()}
    own = [
        {**prompts[row["prompt_id"]], **row, "origin": name}
        for row in (*samples.kept, *samples.fresh)
        if row["model"] == name and row["prompt_id"] in prompts
    ]
    own.sort(key=lambda row: (row["prompt_id"], row["sample_index"]))
    for row in own:
        row["input_digest"] = input_digest(row, tokens=sees_tokens(settings.rewards))
    committed = reusable_rows(work, part, on=["input_digest"])
    known = known_scores(settings.rewards, own, committed, work.store, "evaluation")
    rejects = [
        {"key": f"{prompt_id}/{name}", "reason": reason, "prompt_id": prompt_id}
        for (model, prompt_id), reason in samples.refused.items()
        if model == name and prompt_id in prompts
    ]
    rows = []
    for row, score in zip(own, scorer.score(own, known), strict=True):
        reason = score.error
        if reason is None and row["prompt_id"] not in references:
            reason = "the prompt has no reference rewards"
        if reason is None:
            components = [{"name": reward, "value": value} for reward, value in score.components]
            rows.append({**row, "reward": score.reward, "components": components})
        else:
            key = f"{row['prompt_id']}/{row['model']}/{row['sample_index']}"
            rejects.append({"key": key, "reason": reason, "prompt_id": row["prompt_id"]})
    for row, quantile in zip(rows, _quantiles(rows, references), strict=True):
        row["quantile_reward"] = quantile
    kept = sum(row["model"] == name and row["prompt_id"] in prompts for row in samples.kept)
    reused = kept + sum(map(len, known))
    total = len(own) * (1 + len(settings.rewards))
    return work.commit(
        part,
        pa.Table.from_pylist(rows, schema=_SCHEMA),
        table=TABLE,
        started=started,
        rejects=rejects,
        metadata={"computed": total - reused, "reused": reused, "cut": count_cut(rows)},
    )


def _quantiles(rows: Sequence[Mapping[str, Any]], references: Mapping[str, Sequence[float]]) -> list[float]:
    """The quantile of each reward among its prompt's references; rows of a prompt are adjacent."""
    counts = Counter(row["prompt_id"] for row in rows)
    refs = [references[prompt_id] for prompt_id in counts]
    quantiles = quantile_rewards(
        np.array([row["reward"] for row in rows], dtype=np.float64),
        np.concatenate([*refs, np.empty(0)]),
        offsets=np.cumsum([0, *counts.values()]),
        ref_offsets=np.cumsum([0, *map(len, refs)]),
        ties="mid",
    )
    return [float(quantile) for quantile in quantiles]


def summary(settings: Settings, store: Store, stage_plan: StagePlan) -> dict[str, Any]:
    """The comparison over all parts, with what QRPO's closed-form optimum promises for this
    transform and beta."""
    from qrpo.evaluation.summary import COLUMNS, summarise

    if not stage_plan.parts:
        return {}
    parts = [stage_plan.records[part.key.fingerprint] for part in stage_plan.parts]
    table = store.scan(parts).select(COLUMNS).collect()
    promising = settings.policy if settings.policy.loss == "qrpo" else None
    found = summarise(table.to_arrow(), promising, num_ref=settings.num_ref, seed=settings.seed)
    plain, used = SamplingConfig(), settings.sampling
    names = ("temperature", "top_p", "top_k", "min_p")
    changed = {name: getattr(used, name) for name in names if getattr(used, name) != getattr(plain, name)}
    if not changed:
        return {"summary": found}
    drawn = ", ".join(f"{name} {value:g}" for name, value in changed.items())
    note = f"not the KL of the policy, which needs samples at temperature 1 without cuts: these have {drawn}"
    for one in (found, *found.get("others", {}).values()):
        one["kl"]["estimator"] += f"; {note}"
    return {"summary": found, "note": f"the KL is {note}"}


def _sampled(family: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What samples depend on: not on the rewards, nor on how many samples there are."""
    ignored = ("rewards", "num_samples")
    both: list[Mapping[str, Any]] = [family["settings"], family["outside"]]
    return [{name: value for name, value in of.items() if name not in ignored} for of in both]


def _same_model(part: PartPlan, metadata: Mapping[str, Any]) -> bool:
    """Parts of an earlier version do not name their model; the reference is their family's."""
    if "identity" not in metadata:
        return bool(part.slice["model"] == metadata.get("model") == "reference")
    return bool(metadata["identity"] == part.slice["identity"])


def _costs(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None, same: bool) -> int:
    """One sample, and one score of each reward."""
    scored = _rewards_of(theirs) if theirs is not None and same else None
    return int(theirs is None) + missing_rewards(_rewards_of(ours), scored)


def _rewards_of(family: Mapping[str, Any]) -> dict[str, Any]:
    return {name: family[name]["rewards"] for name in ("settings", "outside")}


STAGE = Stage(
    name="evaluation",
    version=VERSION,
    summary="Compare fresh samples of policy and reference on the held-out prompts.",
    unit="completions",
    parents=("quantiles", "policy"),
    settings=Settings,
    section=EvaluationConfig,
    table=TABLE,
    plan=plan,
    prepare=sample,
    compute=compute,
    in_child=True,
    gpus=lambda settings: max(settings.engine.gpus, reward_gpus(settings.rewards)),
    reuse=RowReuse(
        "samples and scores",
        lambda settings, part, prompts: [
            (prompt_id, part.slice["model"], index)
            for prompt_id in prompts
            for index in range(settings.section.num_samples)
        ],
        ("prompt_id", "model", "sample_index"),
        serves=lambda theirs, ours: _sampled(theirs) == _sampled(ours),
        matches=_same_model,
        costs=_costs,
    ),
    describe=summary,
    why_empty="no prompt is held out: set prompts.eval_fraction or prompts.eval_source",
    remark=remark_on_cut,
    chart="tasks.charts:evaluation_rewards",
)
