"""The `reference` stage: the reference policy, fine-tuned on the dataset's chosen completions where the configuration asks for it.

Without `reference.sft` there is no such stage: the given model is the reference.
"""

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qrpo.config import Section, keyed
from qrpo.data.chat import encode_completion, encode_prompt, load_tokenizer
from qrpo.errors import DataError
from qrpo.models import ModelConfig, model_identity
from qrpo.training.settings import SftConfig
from storage import PartKey, PartRecord, Store, fingerprint
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.stages.prompts import prompt_parts
from tasks.work import Progress, Work, progress_of

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = [
    "ReferenceConfig",
    "compute",
    "model_for",
    "plan",
    "reference_identity",
    "reference_inputs",
    "reference_parent",
]

VERSION = 1


class ReferenceConfig(Section):
    """The reference policy: every quantile and every log ratio is relative to it."""

    model: ModelConfig
    """The model to start from."""
    sft: SftConfig | None = None
    """Fine-tune the model on the chosen completions first (the paper's SFT on chosen); null to take it as it is."""


def plan(config: "PipelineConfig", plans: Mapping[str, StagePlan], store: Store) -> StagePlan:
    """One part, the model folder; no part where no fine-tuning is asked for."""
    sft = config.reference.sft
    settings = {"sft": keyed(sft), "seed": config.seed} if sft else {"sft": None}
    outside = {"model": model_identity(config.reference.model)}
    family = make_family("reference", VERSION, settings, outside)
    parts: tuple[PartPlan, ...] = ()
    if sft is not None:
        prompts = prompt_parts(plans, "train")
        key = PartKey("reference", family, fingerprint([family, [part.slice["offline"] for part in prompts]]))
        parts = (PartPlan(key, tuple(part.key for part in prompts)),)
    return StagePlan("reference", family, settings, outside, parts, {"prompts": plans["prompts"].fingerprint})


def reference_identity(config: "PipelineConfig", plans: Mapping[str, StagePlan]) -> dict[str, Any]:
    """What identifies the reference policy: the fine-tuned artifact, or the given model's files."""
    if config.reference.sft is not None:
        return {"artifact": plans["reference"].fingerprint}
    return dict(plans["reference"].outside["model"])


def reference_inputs(plans: Mapping[str, StagePlan]) -> tuple[PartKey, ...]:
    """The reference's part, for the inputs of stages that use the model."""
    return tuple(part.key for part in plans["reference"].parts)


def reference_parent(plans: Mapping[str, StagePlan]) -> dict[str, str]:
    """The reference's artifact by its stage, for the lineage of stages that use the model; none where it is the given model."""
    return {"reference": plans["reference"].fingerprint} if plans["reference"].parts else {}


def model_for(work: Work, part: PartPlan, stage: str = "reference") -> ModelConfig:
    """The model that `part` uses: the folder that `stage` made, or the configured model where that stage made none."""
    section = work.config.reference.model
    for key in part.inputs:
        if key.stage == stage:
            folder = work.store.fetch_folder(work.record(key))
            return section.model_copy(update={"path": str(folder), "revision": None})
    assert stage == "reference", f"{work.stage} asked for the model of {stage}, which is not among its inputs"
    return section


def compute(work: Work) -> Iterator[PartRecord | Progress]:
    """Fine-tune and commit the model folder. Runs in a child process."""
    from qrpo.training.runs import train_sft

    (part,) = work.parts
    sft = work.config.reference.sft
    assert sft is not None
    started = time.monotonic()
    rows, unusable = _examples(work, part)
    if not rows:
        raise DataError(
            "reference.sft: no prompt has a chosen completion to learn from; "
            "give the data a `chosen` or `completion` column (prompts.columns maps names), or set reference.sft to null"
        )
    scratch = work.store.work_dir(part.key)
    model, seed = work.config.reference.model, work.config.seed
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


def _examples(work: Work, part: PartPlan) -> tuple[list[dict[str, Any]], int]:
    """Every prompt with its first offline completion (the chosen one), and how many could not be encoded."""
    tokenizer = load_tokenizer(work.config.reference.model)
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
                rows.append(
                    {
                        "prompt_id": prompt["prompt_id"],
                        "prompt_token_ids": tokens,
                        "completion_token_ids": [completion],
                    }
                )
    return rows, unusable
