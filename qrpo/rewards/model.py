"""Rewards that are Hugging Face sequence-classification models with one score.

The model reads the whole conversation through its own chat template. Completions are sorted by
length and batched up to a number of tokens, padding included, so batches have little padding.
Results keep the order of the input and do not depend on the batch beyond floating-point rounding.
Scores are float32 for any precision of the model.

For a model that combines several objectives itself (as ArmoRM does), its `score` is used. If memory
runs out, the batch size is halved permanently. vLLM runs the same models: `qrpo.rewards.pooling`.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from qrpo.config import execution_option
from qrpo.data.chat import Messages, encode_conversations, load_tokenizer
from qrpo.data.prompts import functions
from qrpo.engines.options import VLLMOptions
from qrpo.errors import DataError, ModelError
from qrpo.models import ModelConfig, dtype_setting, is_local, load_reward_model, location, model_identity
from qrpo.models.limits import Limits, model_limits
from qrpo.processes.child import Child
from qrpo.rewards.protocol import Answers, Columns, Forms, Prompts, Reward, RewardSection, Score, Texts

logger = logging.getLogger(__name__)

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Environment of a process that scores on a CPU: glibc then reuses the memory of the previous
batch. Otherwise the kernel allocates and zeroes new memory for every activation, which takes a
sixth of the time."""


class ModelRewardConfig(RewardSection):
    """A reward that is a sequence-classification model."""

    kind: Literal["model"] = "model"
    """Says that this reward is a Hugging Face model."""
    model: ModelConfig
    """The model; use float32 if memory allows, since bfloat16 reverses the order of some pairs."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """The library that runs it. Scores differ by rounding, so it is part of fingerprints."""
    options: VLLMOptions = Field(default_factory=dict)
    """More arguments for `vllm.LLM` (`quantization`, ...); only with `engine: vllm`."""
    max_length: int | None = Field(None, ge=1)
    """Maximum tokens of a conversation, by default the model's context; longer ones fail."""
    batch_tokens: int = execution_option(16384, ge=1)
    """Tokens per batch, padding included; halved when memory runs out. vLLM: tokens per step."""
    device: str | None = execution_option(None)
    """Device under transformers (`cpu`, `cuda:1`); by default the first GPU, if any."""
    gpu_memory_utilization: float = execution_option(0.9, gt=0.0, le=1.0)
    """Share of the GPU's memory that vLLM uses."""
    tensor_parallel_size: int = execution_option(1, ge=1)
    """GPUs that share the model under vLLM."""

    @model_validator(mode="after")
    def _options_have_an_engine(self) -> "ModelRewardConfig":
        if self.options and self.engine != "vllm":
            raise ValueError("options are arguments for vLLM: set `engine: vllm`, or remove them")
        return self

    def identity(self) -> dict[str, Any]:
        """The digest of the model's files, or its hub id and revision; and where an earlier version
        scored this model's folder in another precision or at another token, that as well."""
        found: dict[str, Any] = {"model": model_identity(self.model)}
        transformers = self.engine == "transformers"
        if (dtype := dtype_setting(self.model, unstated_is_saved=transformers)) != self.model.dtype:
            found["dtype"] = dtype
        if transformers and _pads_with_end(self.model):
            found["pooled"] = "last token"
        return found

    def open(self, log: Path | None, answers: Answers | None) -> Reward:
        """The model in a child process."""
        return _ChildModel(self, log)


class ModelReward:
    """A reward model and its tokenizer, loaded in this process by transformers."""

    def __init__(self, config: ModelRewardConfig):
        self._tokenizer = load_tokenizer(config.model)
        self._limits = model_limits(config.model, config.max_length, "max_length")
        self.model = load_reward_model(config.model, config.device)
        self._path = config.model.path
        # a model with custom code may have several labels and one score: checked when it runs
        if (labels := self.model.config.num_labels) != 1 and not config.model.trust_remote_code:
            raise ModelError(not_one_score(self._path, labels))
        self._batch_tokens = config.batch_tokens

    @property
    def batch_tokens(self) -> int:
        """The current budget: the configured one, or less after memory ran out."""
        return self._batch_tokens

    def score(
        self, prompts: Sequence[Messages], completions: Sequence[str], tools: Sequence[Any] = ()
    ) -> list[Score]:
        """One score per completion; too long rows, and those the template refuses, have an
        error."""
        given = (prompts, completions, tools)
        return score_conversations(self._tokenizer, self._limits, *given, self.score_ids)

    def score_ids(self, ids: Sequence[list[int]]) -> list[float]:
        """The model's scores of rows of token ids, each at its last token."""
        found: dict[int, float] = {}
        # longest first: if it fits into memory, all others do
        waiting = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
        while waiting:
            batch = waiting[: _batch_rows([len(ids[row]) for row in waiting], self._batch_tokens)]
            while (pad := self._padding([ids[row] for row in batch])) is None and len(batch) > 1:
                batch = batch[: len(batch) // 2]
            rewards = self._forward([ids[row] for row in batch], pad or 0)
            if rewards is None:
                self._halve(len(batch), len(ids[batch[0]]))
                continue
            found |= zip(batch, rewards, strict=True)
            del waiting[: len(batch)]
        return [found[row] for row in range(len(ids))]

    def _forward(self, ids: list[list[int]], pad: int) -> list[float] | None:
        """The model's scores for one batch, padded with `pad`; None if memory ran out."""
        import torch

        longest = max(map(len, ids))
        input_ids_BT = torch.full((len(ids), longest), pad, dtype=torch.long)
        mask_BT = torch.zeros((len(ids), longest), dtype=torch.long)
        for row, sequence in enumerate(ids):
            input_ids_BT[row, : len(sequence)] = torch.as_tensor(sequence)
            mask_BT[row, : len(sequence)] = 1
        device = self.model.device
        try:
            with torch.inference_mode():
                output = self.model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device))
                # multi-objective models (ArmoRM) combine their objectives in `score`
                found = output.score if getattr(output, "score", None) is not None else output.logits
                found = found.float().reshape(len(ids), -1).cpu()
        except (RuntimeError, MemoryError) as error:  # OutOfMemoryError is a RuntimeError
            if not _is_out_of_memory(error):
                raise
            return None
        if found.shape[1] != 1:
            raise ModelError(not_one_score(self._path, found.shape[1]))
        return found[:, 0].tolist()  # type: ignore[no-any-return]

    def _halve(self, rows: int, longest: int) -> None:
        """Halve the token budget after a batch did not fit and its tensors were freed."""
        import torch

        torch.cuda.empty_cache()
        if rows == 1:
            raise ModelError(
                f"the reward model runs out of memory on one conversation of {longest} tokens: lower max_length, or "
                "load it in bfloat16"
            )
        self._batch_tokens = longest * max(1, rows // 2)
        logger.warning("reward model out of memory: batch_tokens is now %d", self._batch_tokens)

    def _padding(self, ids: list[list[int]]) -> int | None:
        """Set the padding id to one that occurs in none of the rows; None if all ids occur.

        transformers reads the score at the last token that is not the padding id, so with a free id
        that is the last token, as in vLLM. With the model's own, often its end token, it would be
        one before.
        """
        text_config = self.model.config.get_text_config()
        used = {token_id for sequence in ids for token_id in sequence}
        free = next((token_id for token_id in range(text_config.vocab_size) if token_id not in used), None)
        text_config.pad_token_id = free
        return free


class _ChildModel:
    """A `Reward` with its model in a child process."""

    def __init__(self, config: ModelRewardConfig, log: Path | None):
        target = {
            "transformers": "qrpo.rewards.model:load_in_child",
            "vllm": "qrpo.rewards.pooling:PoolingReward",
        }[config.engine]
        env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if config.engine == "transformers":
            env |= {name: value for name, value in KEEP_MEMORY.items() if name not in os.environ}
        self._child = Child(target, config, name=f"reward model {config.model.path}", log=log, env=env)

    def score(
        self, prompts: Prompts, completions: Texts, columns: Columns, *, conversational: Forms = None
    ) -> list[Score]:
        """One score per completion, in order."""
        if not completions:
            return []
        scores: list[Score] = self._child.call(
            "score", list(prompts), list(completions), list(columns.get("tools", ()))
        )
        return scores

    def close(self) -> None:
        """End the child process."""
        self._child.close()


def load_in_child(config: ModelRewardConfig) -> ModelReward:
    """A reward model in a process that does nothing else.

    It skips two packages that transformers imports if they are installed, and that no score needs:
    a fifth of the start. A model with custom code may need them.
    """
    if not config.model.trust_remote_code:
        for package in ("scipy", "sklearn"):
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # marks the module as missing
    return ModelReward(config)


def score_conversations(
    tokenizer: Any,
    limits: Limits,
    prompts: Sequence[Messages],
    completions: Sequence[str],
    tools: Sequence[Any],
    score_ids: Callable[[list[list[int]]], list[float]],
) -> list[Score]:
    """One score per completion, by the function of token ids; too long rows, and those that the
    template refuses, have an error. `tools` is the dataset's column of that name, if any."""
    conversations = [
        [*prompt, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    scores: dict[int, Score] = {}
    encoded: dict[int, list[int]] = {}
    given = [functions(column, "tools") for column in tools]
    for row, ids in enumerate(encode_conversations(tokenizer, conversations, given)):
        problem = str(ids) if isinstance(ids, DataError) else limits.problem(ids)
        if problem or isinstance(ids, DataError):
            scores[row] = Score(None, problem)
        else:
            encoded[row] = ids
    for row, reward in zip(encoded, score_ids(list(encoded.values())), strict=True):
        wrong = f"the reward model's score is {reward}, expected a finite number"
        scores[row] = Score(reward) if math.isfinite(reward) else Score(None, wrong)
    return [scores[row] for row in range(len(scores))]


def _batch_rows(lengths: Sequence[int], budget: int) -> int:
    """The number of rows, longest first, of the next batch: within the token budget, and with
    little padding.

    A batch ends before a row of which more than a fifth would be padding: a smaller batch costs
    less.
    """
    most = max(1, budget // lengths[0])
    return next(
        (rows for rows in range(1, min(most, len(lengths))) if lengths[rows] < 0.8 * lengths[0]), most
    )


def _pads_with_end(model: ModelConfig) -> bool:
    """Whether a conversation can end in the padding token of the model's folder: then transformers
    alone would score the token before."""
    if not is_local(model):
        return False

    def read(name: str) -> dict[str, Any]:
        path = Path(location(model), name)
        return json.loads(path.read_bytes()) if path.is_file() else {}

    pad, settings = read("config.json").get("pad_token_id"), read("tokenizer_config.json")
    texts = [
        token["content"] for token in read("tokenizer.json").get("added_tokens", ()) if token["id"] == pad
    ]
    jinja = Path(location(model), "chat_template.jinja")
    template = jinja.read_text() if jinja.is_file() else str(settings.get("chat_template"))
    return any(text in template or text in str(settings.get("eos_token")) for text in texts)


def not_one_score(path: str, got: int) -> str:
    """The error message for a classifier."""
    return f"{path} gives {got} scores, expected a reward model with one: a classifier's labels are no reward"


def _is_out_of_memory(error: BaseException) -> bool:
    """GPUs raise torch.OutOfMemoryError, the CPU's allocator a RuntimeError with this text."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
