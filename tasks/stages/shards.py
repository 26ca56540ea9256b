"""The `shards` stage: training rows with their tokens, quantile rewards and reference
log-probabilities.

One row is a prompt with its K training completions. The reference log-probabilities come from the
forward code that training uses, so that at step 0 the log ratio is zero up to rounding. Rows of a
part are shuffled by a hash of the seed and the prompt; the order of an epoch over all parts is the
reader's.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from qrpo.config import Section, execution_option, keyed
from qrpo.data.chat import encode_prompt, load_tokenizer
from qrpo.models import ModelConfig
from qrpo.models.limits import Limits, model_limits
from qrpo.seeds import seeded_hash
from storage import Manifest, PartRecord, Store, fingerprint, row_digest
from storage.checks import at_least, finite, lists_agree
from storage.reader import PIECE
from storage.table import Table, column
from tasks.engines import keep
from tasks.plan import PartPlan, StagePlan, Upstream, make_family, part_key
from tasks.reuse import reusable_rows
from tasks.stage import RowReuse, Stage, setting
from tasks.stages.completions import prompt_tokens
from tasks.stages.prompts import prompt_rows
from tasks.stages.quantiles import TRAINING_CHECKS, TRAINING_COLUMNS, QuantilesConfig
from tasks.stages.reference import model_for
from tasks.work import Work

VERSION = 1

TABLE = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column("prompt_token_ids", pa.list_(pa.int32())),
            column("completion_token_ids", pa.list_(pa.list_(pa.int32()))),
            *TRAINING_COLUMNS,
            column("ref_logprob", pa.list_(pa.float32())),
            column("num_ref", pa.int32()),
            column("ref_mean", pa.float64(), null=True),
            column("ref_std", pa.float64(), null=True),
        ]
    ),
    key=("prompt_id",),
    checks=(
        lists_agree("sample_index", "ref_logprob", "completion_token_ids"),
        *TRAINING_CHECKS,
        at_least("prompt_token_ids", 0),
        finite("ref_logprob"),
        at_least("completion_token_ids", 0),
    ),
    group_rows=PIECE,
)


class ShardsConfig(Section):
    """The training shards and their reference log-probabilities."""

    max_length: int = Field(4096, ge=2)
    """Longest prompt and completion together, in tokens; a longer completion is a reject."""
    token_budget: int = execution_option(8192, ge=1)
    """Tokens of one forward, padding included."""


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    section: ShardsConfig = setting("shards")
    quantiles: QuantilesConfig = setting("quantiles")
    model: ModelConfig = setting("reference.model")
    dtype: str = setting("policy.dtype", key="policy.bf16")
    packing: bool = setting("policy.packing")
    share_prompts: bool = setting("policy.share_prompts")
    seed: int = setting("seed")
    num_ref: int = setting("completions.num_ref")
    policy_samples: int = setting("rounds.num_completions")


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """One part for every train prompts part."""
    hashed = {**keyed(settings.section), "dtype": settings.dtype, "seed": settings.seed}
    outside = {"model": upstream.reference_identity}
    family = make_family("shards", VERSION, hashed, outside)
    quantiles_of = upstream["quantiles"].by_prompts()
    completions_of = upstream["completions"].by_prompts()
    parts = []
    for prompts in upstream.prompt_parts("train"):
        (quantiles,) = quantiles_of[prompts.key.fingerprint]
        completions = completions_of[prompts.key.fingerprint]
        sources = [part for part in completions if _trained_on(part, settings.quantiles)]
        key = part_key("shards", family, quantiles.key.fingerprint)
        sampled = [part for part in completions if part.slice["origin"] != "offline"]
        # the first has the prompts' tokens
        read = dict.fromkeys(part.key for part in (*sampled[:1], *sources))
        inputs = (prompts.key, quantiles.key, *read, *upstream.reference_inputs)
        samples = fingerprint(sorted({part.key.family for part in sources}))
        common = {"prompts": prompts.key.fingerprint, "split": "train", "samples": samples}
        parts.append(PartPlan(key, inputs, common))
    rows = {"train": fingerprint([family, upstream["quantiles"].rows["train"]])}
    parents = upstream.parents("quantiles", "reference")
    return StagePlan("shards", family, hashed, outside, tuple(parts), parents, rows)


def compute(work: Work[Settings]) -> Iterator[PartRecord]:
    """Compute the group part by part. Runs in a child process, since it loads the reference model,
    and keeps it."""
    settings = work.settings
    model_config = model_for(work, work.parts[0], settings.model)
    tokenizer, limits = load_tokenizer(model_config), model_limits(model_config)

    def scorer() -> LogprobScorer:
        return LogprobScorer(
            model_config,
            settings.dtype,
            settings.section.token_budget,
            packing=settings.packing,
            share_prompts=settings.share_prompts,
        )

    for part in work.parts:
        started = time.monotonic()
        rows, rejects = _rows(work, part, tokenizer, limits)
        known = _known_logprobs(work, part)
        for row in rows:
            prompt = tuple(row["prompt_token_ids"])
            row["ref_logprob"] = [
                known.get((prompt, tuple(tokens))) for tokens in row["completion_token_ids"]
            ]
        unknown = [row for row in rows if None in row["ref_logprob"]]
        computed = sum(row["ref_logprob"].count(None) for row in unknown)
        if unknown:
            _score_unknown(unknown, keep((model_config, "log-probabilities"), scorer))
        rows.sort(key=lambda row: seeded_hash("shards", settings.seed, row["prompt_id"]))
        table = pa.Table.from_pylist(rows, schema=TABLE.schema)
        total = sum(len(row["ref_logprob"]) for row in rows)
        digest = f"{row_digest(table):064x}"
        counts = {"computed": computed, "reused": total - computed, "row_sum": digest}
        yield work.commit(part, table, table=TABLE, started=started, rejects=rejects, metadata=counts)


def _score_unknown(rows: Sequence[dict[str, Any]], scorer: "LogprobScorer") -> None:
    """Score the completions of rows whose log-probability is None."""
    for row in rows:
        row["places"] = [k for k, logprob in enumerate(row["ref_logprob"]) if logprob is None]
    asked = [
        {
            "prompt_token_ids": row["prompt_token_ids"],
            "completion_token_ids": [row["completion_token_ids"][k] for k in row["places"]],
        }
        for row in rows
    ]
    scorer.score(asked, "ref_logprob")
    for row, answer in zip(rows, asked, strict=True):
        for k, logprob in zip(row.pop("places"), answer["ref_logprob"], strict=True):
            row["ref_logprob"][k] = logprob


class LogprobScorer:
    """A model loaded as training loads it, to score rows with the forward that training uses."""

    def __init__(
        self,
        model: ModelConfig,
        dtype: str,
        token_budget: int,
        *,
        packing: bool = True,
        share_prompts: bool = True,
    ) -> None:
        import torch

        from qrpo.training.logprobs import best_layout
        from qrpo.training.runs import load_policy

        self._model = load_policy(model)
        self._layout = best_layout(self._model, share_prompts) if packing else "padded"
        self._dtype = getattr(torch, dtype)
        self._token_budget = token_budget

    def score(self, rows: Sequence[dict[str, Any]], column: str) -> None:
        """Set `column` of each row to the log-probabilities (K,) of its `completion_token_ids`."""
        from qrpo.training.logprobs import score_logprobs

        scores = score_logprobs(self._model, rows, self._token_budget, dtype=self._dtype, layout=self._layout)
        for row, scores_K in zip(rows, scores, strict=True):
            row[column] = scores_K.tolist()

    def score_tokens(self, rows: Sequence[dict[str, Any]], column: str) -> None:
        """Set `column` of each row to the log-probabilities (T,) of the tokens of its one
        completion."""
        from qrpo.training.logprobs import score_token_logprobs

        scores = score_token_logprobs(
            self._model, rows, self._token_budget, dtype=self._dtype, layout=self._layout
        )
        for row, (scores_T,) in zip(rows, scores, strict=True):
            row[column] = scores_T.tolist()

    def close(self) -> None:
        """Free the memory of the model, also on the GPU."""
        import gc

        import torch

        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _trained_on(part: PartPlan, section: QuantilesConfig) -> bool:
    """Whether a completions part holds any completion that is trained on."""
    if part.slice["origin"] == "offline":
        return section.train_on in ("offline", "both")
    if part.slice["origin"] == "policy":
        return True
    return section.train_on in ("reference", "both") and (
        section.num_completions is None or part.slice["start"] < section.num_completions
    )


_PER_COMPLETION = ("origin", "sample_index", "reward", "quantile_reward", "quantile_low", "quantile_high")


def _rows(
    work: Work[Settings], part: PartPlan, tokenizer: Any, limits: Limits
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The part's rows without their log-probabilities, and the rejects."""
    prompts = prompt_rows(work, part, "messages")
    prompt_ids, tokens = _tokens(work, part)
    rows, rejects = [], []
    columns = ["prompt_id", "num_ref", "ref_mean", "ref_std", "num_excluded", *_PER_COMPLETION]
    for group in work.store.read_part(work.input(part, "quantiles"), columns=columns).to_pylist():
        if group["num_excluded"] and not group["sample_index"]:
            continue  # all its completions have the reward of every reference (`quantiles.equal_rewards`)
        prompt_id = group["prompt_id"]
        prompt = prompts[prompt_id]
        prompt_token_ids = prompt_ids.get(prompt_id) or encode_prompt(
            tokenizer, prompt["messages"], prompt["tools"]
        )
        row, refused = _row(work.settings, group, prompt_token_ids, tokens, limits)
        rejects += refused
        rows += [row] if row is not None else []
    return rows, rejects


def _tokens(
    work: Work[Settings], part: PartPlan
) -> tuple[dict[str, list[int]], dict[tuple[str, str, int], list[int] | None]]:
    """The token ids that each prompt was sampled from; those of the completions that are trained
    on, by prompt, origin and sample index, None where a completion was sampled from others."""
    keep = work.settings.quantiles.num_completions
    trained = pc.field("origin") != "reference"
    trained |= pc.scalar(True) if keep is None else pc.field("sample_index") < keep
    columns = ["prompt_id", "origin", "sample_index", "token_ids"]
    prompts: dict[str, list[int]] = {}
    completions: dict[tuple[str, str, int], list[int] | None] = {}
    for record in work.inputs(part, "completions"):
        own = prompt_tokens(work.store, [record])
        prompts = own | prompts
        for row in work.store.read_part(record, columns=columns).filter(trained).to_pylist():
            prompt_id = row["prompt_id"]
            same = own.get(prompt_id) in (None, prompts.get(prompt_id))
            completions[prompt_id, row["origin"], row["sample_index"]] = row["token_ids"] if same else None
    return prompts, completions


def _row(
    settings: Settings,
    group: Mapping[str, Any],
    prompt_token_ids: list[int],
    tokens: Mapping[tuple[str, str, int], list[int] | None],
    limits: Limits,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """One prompt's row, without the completions that are empty or too long; None where none is
    left."""
    prompt_id = group["prompt_id"]
    limit, name = settings.section.max_length, "shards.max_length is"
    if limits.max_length < limit:
        limit, name = limits.max_length, "the model's context is"
    keep, rejects = [], []
    for k, (origin, index) in enumerate(zip(group["origin"], group["sample_index"], strict=True)):
        completion = tokens[prompt_id, origin, index]
        length = len(prompt_token_ids) + len(completion or ())
        reason = limits.unknown_token([*prompt_token_ids, *(completion or ())])
        if completion is None:
            reason = "it was sampled when the chat template rendered this prompt as other tokens"
        elif length > limit:
            reason = f"prompt and completion have {length} tokens, {name} {limit}"
        elif not completion:
            reason = "no tokens"
        if reason is None:
            keep.append(k)
            continue
        rejects.append({"key": f"{prompt_id}/{origin}/{index}", "reason": reason, "prompt_id": prompt_id})
    if not keep:
        rejects.append(
            {"key": prompt_id, "reason": "no scored training completion is left", "prompt_id": prompt_id}
        )
        return None, rejects
    section = settings.quantiles
    own = section.self_exclusion and section.train_on == "reference" and section.num_ref is None
    row = {
        "prompt_id": prompt_id,
        "prompt_token_ids": prompt_token_ids,
        "ref_mean": group["ref_mean"],
        "ref_std": group["ref_std"],
        "num_ref": group["num_ref"] - own,  # rewards that each quantile was taken among
        **{name: [group[name][k] for k in keep] for name in _PER_COMPLETION},
    }
    named = zip(row["origin"], row["sample_index"], strict=True)
    return row | {
        "completion_token_ids": [tokens[prompt_id, origin, index] for origin, index in named]
    }, rejects


def _known_logprobs(work: Work[Settings], part: PartPlan) -> dict[tuple[Any, ...], float]:
    """Log-probabilities under the same model from earlier shards of this family, by the tokens of
    prompt and completion."""
    rows = reusable_rows(work, part, on=["prompt_id", "completion_token_ids"])
    return {
        (tuple(row["prompt_token_ids"]), tuple(tokens)): logprob
        for row in rows.to_dicts()
        for tokens, logprob in zip(row["completion_token_ids"], row["ref_logprob"], strict=True)
    }


def _to_score(settings: Settings, part: PartPlan, prompts: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """The completions that are trained on."""
    section = settings.quantiles
    names: list[tuple[str, str, int]] = []
    for prompt_id, offline in prompts.items():
        if section.train_on in ("offline", "both"):
            names += [(prompt_id, "offline", index) for index in range(offline)]
        if section.train_on in ("reference", "both"):
            names += [
                (prompt_id, "reference", index)
                for index in range(section.num_completions or settings.num_ref)
            ]
        if section.train_on == "policy":
            names += [(prompt_id, "policy", index) for index in range(settings.policy_samples)]
    return names


def _lost_rows(manifest: Manifest, store: Store) -> tuple[int, int]:
    """Where one completion cannot be used, the row of its prompt stays."""
    rejects = [store.read_rejects(record) for record in manifest.parts if record.rejects]
    lost = sum(row["key"] == row["prompt_id"] for table in rejects for row in table.to_pylist())
    return lost, manifest.rows + lost


STAGE = Stage(
    name="shards",
    version=VERSION,
    summary="Write the training rows: tokens, quantile rewards and reference log-probabilities.",
    unit="prompts",
    parents=("quantiles",),
    settings=Settings,
    section=ShardsConfig,
    table=TABLE,
    plan=plan,
    compute=compute,
    in_child=True,
    reuse=RowReuse(
        "log-probabilities",
        _to_score,
        ("prompt_id", "origin", "sample_index"),
        matches=lambda part, metadata: metadata.get("samples") in (None, part.slice["samples"]),
    ),
    lost_rows=_lost_rows,
)
