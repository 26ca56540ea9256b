"""The `reference` stage: the reference policy, fine-tuned on the dataset's chosen completions where
the configuration asks for it.

Without `reference.sft` there is no such stage: the given model is the reference.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qrpo.config import Section, keyed
from qrpo.data.chat import encode_completion, encode_prompt, load_tokenizer
from qrpo.errors import ConfigError, DataError
from qrpo.models import ModelConfig, has_float32_files
from qrpo.models.limits import model_limits
from qrpo.seeds import seeded_hash
from qrpo.training.ranks import number_of_processes, stream_ranks
from qrpo.training.settings import OptimizationConfig, SftConfig
from storage import PartRecord
from tasks.models import known_identity
from tasks.plan import PartPlan, StagePlan, Upstream, make_family, part_key, single_part
from tasks.stage import Stage, setting
from tasks.stages.prompts import content, read_prompts
from tasks.work import Progress, Work, progress_of

VERSION = 2


class ReferenceConfig(Section):
    """The reference policy: every quantile and every log ratio is relative to it."""

    model: ModelConfig
    """The model to start from."""
    sft: SftConfig | None = None
    """Fine-tune the model on the chosen completions first (the paper's SFT on chosen); null to take
    it as it is."""


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    model: ModelConfig = setting("reference.model")
    sft: SftConfig | None = setting("reference.sft")
    seed: int = setting("seed")


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """One part, the model folder; no part where no fine-tuning is asked for."""
    sft = settings.sft
    hashed: dict[str, Any] = {"sft": None}
    if sft:
        hashed = {"sft": keyed(sft) | precision_settings(sft, settings.model), "seed": settings.seed}
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


def precision_settings(section: OptimizationConfig, model: ModelConfig) -> dict[str, str]:
    """What `save_dtype: auto` adds to a fingerprint: nothing where earlier versions, which always
    rounded, lost nothing."""
    decides = section.save_dtype == "auto" and section.learning_rate < 1e-5
    return {"save_dtype": "auto"} if decides and not has_float32_files(model) else {}


def model_for(work: Work[Any], part: PartPlan, model: ModelConfig, stage: str = "reference") -> ModelConfig:
    """The model that `part` uses: the folder that `stage` made, or the configured `model` where
    that stage made none."""
    for key in part.inputs:
        if key.stage == stage:
            folder = work.store.fetch_folder(work.record(key))
            return model.model_copy(update={"path": str(folder), "revision": None})
    assert stage == "reference", f"{work.stage} asked for the model of {stage}, which is not among its inputs"
    return model


def compute(work: Work[Settings]) -> Iterator[PartRecord | Progress]:
    """Fine-tune and commit the model folder. Runs in a child process."""
    (part,) = work.parts
    sft = work.settings.sft
    assert sft is not None
    started = time.monotonic()
    scratch = work.resume(part)
    rows, unusable = _write_examples(work, part, scratch)
    if not rows:
        raise DataError(
            "reference.sft: no prompt has a chosen completion to learn from; "
            "give the data a `chosen` or `completion` column (prompts.columns maps names), or set reference.sft to null"
        )
    yield from on_ranks(train, work, sft)
    metadata = {"rows": rows, "unusable": unusable}
    yield work.commit_folder(part, scratch / "final", rows=rows, started=started, metadata=metadata)


def train(work: Work[Settings]) -> Iterator[Progress]:
    """Fine-tune into the work folder: the whole run, or one rank's part of it where
    `qrpo.training.ranks` started this process."""
    from qrpo.training.runs import train_policy

    (part,) = work.parts
    sft, model, seed = work.settings.sft, work.settings.model, work.settings.seed
    assert sft is not None
    folder = work.folder(part)
    options: dict[str, Any] = {"seed": seed, "saving": lambda: work.saving(part)}
    yield from progress_of(
        lambda report: train_policy(model, _Examples(folder), sft, folder, on_progress=report, **options)
    )


def on_ranks(
    train: Callable[[Work[Any]], Iterator[Progress]], work: Work[Any], section: OptimizationConfig
) -> Iterator[Progress]:
    """Run `train(work)` in as many processes as the section says; in this one if that is one."""
    processes = number_of_processes(section)
    if processes > 1 and work.store.url.startswith("memory://"):
        raise ConfigError(
            f"{work.stage}: {processes} training processes cannot see a memory:// store: set `processes` to 1, or use another store"
        )
    if processes == 1:
        yield from train(work)
    else:
        target = f"{train.__module__}:{train.__qualname__}"
        yield from stream_ranks(target, work, processes=processes, log=work.log)


def _write_examples(work: Work[Settings], part: PartPlan, folder: Path) -> tuple[int, int]:
    """Write every prompt with its first offline completion (the chosen one) as tokens; how many
    there are, and how many could not be encoded.

    `_Examples` reads them in the order of a hash of seed and prompt, which no cut into parts
    changes.
    """
    tokenizer, limits = load_tokenizer(work.settings.model), model_limits(work.settings.model)
    keys: list[bytes] = []
    unusable = 0
    with pa.ipc.new_file(folder / "examples.arrow", _EXAMPLE) as file:
        for record in work.inputs(part, "prompts"):
            rows = []
            for prompt in read_prompts(work.store, record, "messages", "offline_completions"):
                messages, tools = prompt["messages"], prompt["tools"]
                for text in prompt["offline_completions"][:1]:
                    try:
                        completion = encode_completion(tokenizer, messages, text, tools)
                    except DataError:
                        unusable += 1
                        continue
                    tokens = encode_prompt(tokenizer, messages, tools)
                    whole = [*tokens, *completion]
                    if len(whole) > limits.max_length or limits.unknown_token(whole):
                        unusable += 1
                        continue
                    rows.append((prompt["prompt_id"], tokens, [completion]))
                    keys.append(seeded_hash("sft", work.settings.seed, prompt["prompt_id"]))
            file.write(
                pa.RecordBatch.from_pylist(
                    [dict(zip(_EXAMPLE.names, row, strict=True)) for row in rows], _EXAMPLE
                )
            )
    np.save(folder / "order.npy", np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64))
    return len(keys), unusable


_EXAMPLE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completion_token_ids", pa.list_(pa.list_(pa.int32()))),
    ]
)


class _Examples(Sequence[dict[str, Any]]):
    """The rows of `_write_examples`, read from the file as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._order = np.load(folder / "order.npy")
        self._table = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow"))).read_all()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        return self._table.slice(self._order[index], 1).to_pylist()[0]


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
    gpus=lambda settings: number_of_processes(settings.sft) if settings.sft else 1,
    why_empty="reference.sft is null: the model is taken as it is",
    chart="tasks.charts:training_loss",
)
