"""The `reference` stage: the reference policy, fine-tuned on the dataset's chosen completions where the configuration asks for it.

Without `reference.sft` there is no such stage: the given model is the reference.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qrpo.config import Section, keyed
from qrpo.data.chat import encode_completion, encode_prompt, load_tokenizer
from qrpo.errors import DataError
from qrpo.models import ModelConfig
from qrpo.models.limits import model_limits
from qrpo.seeds import seeded_hash
from qrpo.training.settings import SftConfig
from storage import PartRecord
from tasks.models import known_identity
from tasks.plan import PartPlan, StagePlan, Upstream, make_family, part_key, single_part
from tasks.stage import Stage, setting
from tasks.stages.prompts import content
from tasks.work import Progress, Work, progress_of

__all__ = ["STAGE", "ReferenceConfig", "compute", "model_for", "plan"]

VERSION = 2


class ReferenceConfig(Section):
    """The reference policy: every quantile and every log ratio is relative to it."""

    model: ModelConfig
    """The model to start from."""
    sft: SftConfig | None = None
    """Fine-tune the model on the chosen completions first (the paper's SFT on chosen); null to take it as it is."""


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    model: ModelConfig = setting("reference.model")
    sft: SftConfig | None = setting("reference.sft")
    seed: int = setting("seed")


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """One part, the model folder; no part where no fine-tuning is asked for."""
    sft = settings.sft
    hashed = {"sft": keyed(sft), "seed": settings.seed} if sft else {"sft": None}
    outside = {"model": known_identity(settings.model, upstream.store, "completions", "reference")}
    family = make_family("reference", VERSION, hashed, outside)
    parents = upstream.parents("prompts")
    if sft is None:
        return StagePlan("reference", family, hashed, outside, (), parents)
    prompts = upstream.prompt_parts("train")
    before = make_family("reference", 1, hashed, outside)
    earlier = part_key("reference", before, [part.slice["offline"] for part in prompts])
    examples = content(upstream, "train", "chosen_sum")
    key, artifact = single_part("reference", family, upstream.store, examples, earlier=earlier)
    parts = (PartPlan(key, tuple(part.key for part in prompts)),)
    return StagePlan("reference", family, hashed, outside, parts, parents, artifact=artifact)


def model_for(work: Work[Any], part: PartPlan, model: ModelConfig, stage: str = "reference") -> ModelConfig:
    """The model that `part` uses: the folder that `stage` made, or the configured `model` where that stage made none."""
    for key in part.inputs:
        if key.stage == stage:
            folder = work.store.fetch_folder(work.record(key))
            return model.model_copy(update={"path": str(folder), "revision": None})
    assert stage == "reference", f"{work.stage} asked for the model of {stage}, which is not among its inputs"
    return model


def compute(work: Work[Settings]) -> Iterator[PartRecord | Progress]:
    """Fine-tune and commit the model folder. Runs in a child process."""
    from qrpo.training.runs import train_sft

    (part,) = work.parts
    sft = work.settings.sft
    assert sft is not None
    started = time.monotonic()
    rows, unusable = _examples(work, part)
    if not rows:
        raise DataError(
            "reference.sft: no prompt has a chosen completion to learn from; "
            "give the data a `chosen` or `completion` column (prompts.columns maps names), or set reference.sft to null"
        )
    scratch = work.store.work_dir(part.key)
    model, seed = work.settings.model, work.settings.seed
    yield from progress_of(lambda report: train_sft(model, rows, sft, scratch, seed=seed, on_progress=report))
    yield work.store.commit_folder(
        part.key,
        scratch / "final",
        rows=len(rows),
        parents=work.parent_digests(part),
        metadata={"rows": len(rows), "unusable": unusable},
        seconds=time.monotonic() - started,
        replace=part.replace,
    )
    work.store.clear_work(part.key)


def _examples(work: Work[Settings], part: PartPlan) -> tuple[list[dict[str, Any]], int]:
    """Every prompt with its first offline completion (the chosen one), and how many could not be encoded.

    In the order of a hash of seed and prompt, which no cut into parts changes.
    """
    tokenizer, limits = load_tokenizer(work.settings.model), model_limits(work.settings.model)
    rows, unusable = [], 0
    for record in work.inputs(part, "prompts"):
        table = work.store.read_part(record, columns=["prompt_id", "messages", "offline_completions"])
        for prompt in table.to_pylist():
            for text in prompt["offline_completions"][:1]:
                try:
                    completion = encode_completion(tokenizer, prompt["messages"], text)
                except DataError:
                    unusable += 1
                    continue
                tokens = encode_prompt(tokenizer, prompt["messages"])
                whole = [*tokens, *completion]
                if len(whole) > limits.max_length or limits.unknown_token(whole):
                    unusable += 1
                    continue
                rows.append(
                    {
                        "prompt_id": prompt["prompt_id"],
                        "prompt_token_ids": tokens,
                        "completion_token_ids": [completion],
                    }
                )
    rows.sort(key=lambda row: seeded_hash("sft", work.settings.seed, row["prompt_id"]))
    return rows, unusable


STAGE = Stage(
    name="reference",
    version=VERSION,
    summary="Fine-tune the reference policy on the chosen completions, where the configuration asks for it.",
    unit="examples",
    parents=("prompts",),
    settings=Settings,
    section=ReferenceConfig,
    plan=plan,
    compute=compute,
    in_child=True,
    trains=True,
    why_empty="reference.sft is null: the model is taken as it is",
    chart="tasks.charts:training_loss",
)
