"""The `shards` stage: training rows with their tokens, quantile rewards and reference log-probabilities.

One row is a prompt with its K training completions. The reference log-probabilities come from the very forward code that training uses, so
that at step 0 the log ratio is zero up to rounding. Rows of a part are shuffled by a hash of the seed and the prompt; the order of an
epoch over all parts is the reader's.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from qrpo.config import Section, execution_option, keyed
from qrpo.data.chat import encode_prompt, load_tokenizer
from qrpo.models import ModelConfig
from storage import PartKey, PartRecord, Store, fingerprint
from storage.tables import SCHEMAS
from tasks.engines import keep
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.reuse import reusable_rows
from tasks.stages.completions import parts_by_prompts
from tasks.stages.prompts import prompt_parts, prompt_rows
from tasks.stages.reference import model_for, reference_identity, reference_inputs, reference_parent
from tasks.work import Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["LogprobScorer", "ShardsConfig", "compute", "plan"]

VERSION = 1


class ShardsConfig(Section):
    """The training shards and their reference log-probabilities."""

    max_length: int = Field(4096, ge=2)
    """Longest prompt and completion together, in tokens; a longer completion is a reject."""
    token_budget: int = execution_option(8192, ge=1)
    """Tokens of one forward, padding included."""


def plan(config: "PipelineConfig", plans: Mapping[str, StagePlan], store: Store) -> StagePlan:
    """One part for every train prompts part."""
    settings = {**keyed(config.shards), "dtype": config.policy.dtype, "seed": config.seed}
    outside = {"model": reference_identity(config, plans)}
    family = make_family("shards", VERSION, settings, outside)
    by_prompts = {part.slice["prompts"]: part for part in plans["quantiles"].parts}
    completions = parts_by_prompts(plans["completions"])
    parts = []
    for prompts in prompt_parts(plans, "train"):
        quantiles = by_prompts[prompts.key.fingerprint]
        sources = [part for part in completions[prompts.key.fingerprint] if _trained_on(part, config)]
        key = PartKey("shards", family, fingerprint([family, quantiles.key.fingerprint]))
        inputs = (prompts.key, quantiles.key, *(part.key for part in sources), *reference_inputs(plans))
        parts.append(PartPlan(key, inputs, {"prompts": prompts.key.fingerprint, "split": "train"}))
    parents = {"quantiles": plans["quantiles"].fingerprint, **reference_parent(plans)}
    return StagePlan("shards", family, settings, outside, tuple(parts), parents)


def compute(work: Work) -> Iterator[PartRecord]:
    """Compute the group part by part. Runs in a child process, since it loads the reference model, and keeps it."""
    model_config = model_for(work, work.parts[0])
    tokenizer = load_tokenizer(model_config)
    for part in work.parts:
        started = time.monotonic()
        rows, rejects = _rows(work, part, tokenizer)
        known = _known_logprobs(work, part)
        for row in rows:
            row["ref_logprob"] = known.get(_tokens_key(row))
        unknown = [row for row in rows if row["ref_logprob"] is None]
        if unknown:
            scorer = keep(
                (model_config, "log-probabilities"), lambda: LogprobScorer(model_config, work.config)
            )
            scorer.score(unknown, "ref_logprob")
        rows.sort(key=lambda row: _shuffle_key(work.config.seed, row["prompt_id"]))
        table = pa.Table.from_pylist(rows, schema=SCHEMAS["shards"])
        yield work.commit(
            part,
            table,
            started=started,
            rejects=rejects,
            metadata={"logprobs_reused": len(rows) - len(unknown)},
        )


class LogprobScorer:
    """A model loaded as training loads it, to score rows with the forward that training uses."""

    def __init__(self, model: ModelConfig, config: "PipelineConfig") -> None:
        import torch

        from qrpo.training.logprobs import can_share
        from qrpo.training.runs import load_policy

        self._model = load_policy(model)
        self._share = config.policy.share_prompts and can_share(self._model)
        self._dtype = getattr(torch, config.policy.dtype)
        self._token_budget = config.shards.token_budget

    def score(self, rows: Sequence[dict[str, Any]], column: str) -> None:
        """Set `column` of each row to the log-probabilities (K,) of its `completion_token_ids`."""
        from qrpo.training.logprobs import score_logprobs

        scores = score_logprobs(
            self._model, rows, self._token_budget, dtype=self._dtype, share_prompts=self._share
        )
        for row, scores_K in zip(rows, scores, strict=True):
            row[column] = scores_K.tolist()

    def score_tokens(self, rows: Sequence[dict[str, Any]], column: str) -> None:
        """Set `column` of each row to the log-probabilities (T,) of the tokens of its one completion."""
        from qrpo.training.logprobs import score_token_logprobs

        scores = score_token_logprobs(self._model, rows, self._token_budget, dtype=self._dtype)
        for row, (scores_T,) in zip(rows, scores, strict=True):
            row[column] = scores_T.tolist()

    def close(self) -> None:
        """Let the model go."""
        del self._model


def _trained_on(part: PartPlan, config: "PipelineConfig") -> bool:
    section = config.quantiles
    if part.slice["origin"] == "offline":
        return section.train_on in ("offline", "both")
    if part.slice["origin"] == "policy":
        return True
    return section.train_on in ("reference", "both") and (
        section.num_completions is None or part.slice["start"] < section.num_completions
    )


_PER_COMPLETION = ("origin", "sample_index", "reward", "quantile_reward", "quantile_low", "quantile_high")


def _rows(work: Work, part: PartPlan, tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The part's rows but for their log-probabilities, and what was left out with the reason."""
    prompts = prompt_rows(work, part, "messages")
    tokens = _completion_tokens(work, part)
    rows, rejects = [], []
    columns = ["prompt_id", "num_ref", "ref_mean", "ref_std", *_PER_COMPLETION]
    for group in work.store.read_part(work.input(part, "quantiles"), columns=columns).to_pylist():
        prompt_token_ids = encode_prompt(tokenizer, prompts[group["prompt_id"]]["messages"])
        row, refused = _row(work.config, group, prompt_token_ids, tokens)
        rejects += refused
        rows += [row] if row is not None else []
    return rows, rejects


def _completion_tokens(work: Work, part: PartPlan) -> dict[tuple[str, str, int], list[int]]:
    """Token ids of the completions that are trained on, by prompt, origin and sample index."""
    keep = work.config.quantiles.num_completions
    trained = pc.field("origin") != "reference"
    trained |= pc.scalar(True) if keep is None else pc.field("sample_index") < keep
    columns = ["prompt_id", "origin", "sample_index", "token_ids"]
    return {
        (row["prompt_id"], row["origin"], row["sample_index"]): row["token_ids"]
        for record in work.inputs(part, "completions")
        for row in work.store.read_part(record, columns=columns).filter(trained).to_pylist()
    }


def _row(
    config: "PipelineConfig",
    group: Mapping[str, Any],
    prompt_token_ids: list[int],
    tokens: Mapping[tuple[str, str, int], list[int]],
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """One prompt's row, without the completions that are empty or too long; None where none is left."""
    prompt_id, limit = group["prompt_id"], config.shards.max_length
    keep, rejects = [], []
    for k, (origin, index) in enumerate(zip(group["origin"], group["sample_index"], strict=True)):
        completion = tokens[prompt_id, origin, index]
        length = len(prompt_token_ids) + len(completion)
        if completion and length <= limit:
            keep.append(k)
            continue
        reason = (
            f"prompt and completion have {length} tokens, shards.max_length is {limit}"
            if completion
            else "no tokens"
        )
        rejects.append({"key": f"{prompt_id}/{origin}/{index}", "reason": reason, "prompt_id": prompt_id})
    if not keep:
        rejects.append(
            {"key": prompt_id, "reason": "no scored training completion is left", "prompt_id": prompt_id}
        )
        return None, rejects
    section = config.quantiles
    left_out = section.self_exclusion and section.train_on == "reference" and section.num_ref is None
    row = {
        "prompt_id": prompt_id,
        "prompt_token_ids": prompt_token_ids,
        "ref_mean": group["ref_mean"],
        "ref_std": group["ref_std"],
        "num_ref": group["num_ref"] - left_out,  # rewards that each quantile was taken among
        **{name: [group[name][k] for k in keep] for name in _PER_COMPLETION},
    }
    named = zip(row["origin"], row["sample_index"], strict=True)
    return row | {
        "completion_token_ids": [tokens[prompt_id, origin, index] for origin, index in named]
    }, rejects


def _known_logprobs(work: Work, part: PartPlan) -> dict[tuple[Any, ...], list[float]]:
    """Log-probabilities of the same tokens under the same model from earlier shards of this family."""
    reusable = reusable_rows(work, part, on=["prompt_id", "completion_token_ids"])
    return {_tokens_key(row): row["ref_logprob"] for row in reusable.to_dicts()}


def _tokens_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    completions: Sequence[Sequence[int]] = row["completion_token_ids"]
    return tuple(row["prompt_token_ids"]), tuple(tuple(tokens) for tokens in completions)


def _shuffle_key(seed: int, prompt_id: str) -> bytes:
    return hashlib.sha256(f"shards\0{seed}\0{prompt_id}".encode()).digest()
