"""Rewards that are Hugging Face sequence-classification models with one score.

The model reads the whole conversation through its own chat template. Completions are sorted by length and batched up
to a number of tokens, padding included, so little of a batch is padding; results come back in the order given and do
not depend on the batch beyond floating-point rounding. Scores are float32 whatever the model's precision.

A model with several objectives that combines them itself (ArmoRM's shape) gives its `score`. Where memory runs out the
batch is halved, and stays so. vLLM runs the same models: `qrpo.rewards.pooling`.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from qrpo.config import execution_option
from qrpo.data.chat import Messages, encode_conversations, load_tokenizer
from qrpo.errors import DataError, ModelError
from qrpo.models import ModelConfig, context_length, load_reward_model, model_identity
from qrpo.processes.child import Child
from qrpo.rewards.protocol import Answers, Columns, Reward, RewardSection, Score

__all__ = ["KEEP_MEMORY", "ModelReward", "ModelRewardConfig", "as_score", "encode_rows", "not_one_score"]

logger = logging.getLogger(__name__)

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Environment of a process that scores on a CPU: glibc then keeps what a batch frees for the next one. Otherwise every
activation is new memory from the kernel, which must fill it with zeros: a sixth of the time."""


class ModelRewardConfig(RewardSection):
    """A reward that is a sequence-classification model."""

    kind: Literal["model"] = "model"
    """Says that this reward is a Hugging Face model."""
    model: ModelConfig
    """The model; float32 where memory allows, since bfloat16 turns some pairs round."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs it. Scores differ by rounding, so it counts in fingerprints."""
    options: dict[str, Any] = Field(default_factory=dict)
    """More arguments for `vllm.LLM` (`quantization`, `hf_overrides`, ...); for that engine alone."""
    max_length: int | None = Field(None, ge=1)
    """Longest conversation in tokens, by default the model's context; longer ones fail rather than lose their end."""
    batch_tokens: int = execution_option(16384, ge=1)
    """Tokens per batch, padding included; halved when memory runs out. For vLLM, tokens in one step."""
    device: str | None = execution_option(None)
    """Where transformers runs it: `cpu`, `cuda`, `cuda:1`; by default the first GPU where there is one."""
    gpu_memory_utilization: float = execution_option(0.9, gt=0.0, le=1.0)
    """Share of the GPU's memory that vLLM takes."""
    tensor_parallel_size: int = execution_option(1, ge=1)
    """GPUs that share the model under vLLM."""

    @model_validator(mode="after")
    def _options_have_an_engine(self) -> "ModelRewardConfig":
        if self.options and self.engine != "vllm":
            raise ValueError("options are arguments for vLLM: set `engine: vllm`, or leave them out")
        return self

    def identity(self) -> dict[str, Any]:
        """What the model's files are, or its hub id and revision."""
        return {"model": model_identity(self.model)}

    def open(self, log: Path | None, answers: Answers | None) -> Reward:
        """The model in a child process."""
        return _ChildModel(self, log)


class ModelReward:
    """A reward model and its tokenizer, loaded in this process by transformers."""

    def __init__(self, config: ModelRewardConfig):
        self._tokenizer = load_tokenizer(config.model)
        self._max_length = config.max_length or context_length(config.model)
        self.model = load_reward_model(config.model, config.device)
        self._path = config.model.path
        # a model with code of its own may have several and still give one score: seen when it is run
        if (labels := self.model.config.num_labels) != 1 and not config.model.trust_remote_code:
            raise ModelError(not_one_score(self._path, labels))
        self._batch_tokens = config.batch_tokens

    @property
    def batch_tokens(self) -> int:
        """The budget as it stands: what was configured, or less after memory ran out."""
        return self._batch_tokens

    def score(self, prompts: Sequence[Messages], completions: Sequence[str]) -> list[Score]:
        """One score per completion, in order; rows that are too long or that the template refuses have an error."""
        encoded, scores = encode_rows(self._tokenizer, prompts, completions, self._max_length)
        # what needs most memory first: if it fits, all does
        waiting = sorted(encoded, key=lambda row: len(encoded[row]), reverse=True)
        while waiting:
            batch = waiting[: _batch_rows([len(encoded[row]) for row in waiting], self._batch_tokens)]
            rewards = self._forward([encoded[row] for row in batch])
            if rewards is None:
                self._halve(len(batch), len(encoded[batch[0]]))
                continue
            scores |= zip(batch, map(as_score, rewards), strict=True)
            del waiting[: len(batch)]
        return [scores[row] for row in range(len(completions))]

    def _forward(self, ids: list[list[int]]) -> list[float] | None:
        """The model's scores for one padded batch; None where memory ran out."""
        import torch

        longest = max(map(len, ids))
        pad = self._padding(ids)
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
        """Half the budget of a batch that did not fit. Called once its tensors are gone with the exception."""
        import torch

        torch.cuda.empty_cache()
        if rows == 1:
            raise ModelError(
                f"the reward model runs out of memory on one conversation of {longest} tokens: lower max_length, or "
                "load it in bfloat16"
            )
        self._batch_tokens = longest * max(1, rows // 2)
        logger.warning("reward model out of memory: batch_tokens is now %d", self._batch_tokens)

    def _padding(self, ids: list[list[int]]) -> int:
        """The id to pad with, which the model reads its own way: it scores the last token that is another.

        A model without one is used on single sequences by its users and scores the last token whatever it is. The
        same comes of padding with an id that is in none of the sequences.
        """
        text_config = self.model.config.get_text_config()
        if text_config.pad_token_id is not None and not getattr(self, "_pads_freely", False):
            return int(text_config.pad_token_id)
        self._pads_freely = True
        used = {token_id for sequence in ids for token_id in sequence}
        text_config.pad_token_id = next(
            token_id for token_id in range(text_config.vocab_size) if token_id not in used
        )
        return int(text_config.pad_token_id)


class _ChildModel:
    """A reward model in a child process, as the `Reward` protocol wants it."""

    def __init__(self, config: ModelRewardConfig, log: Path | None):
        target = {"transformers": "qrpo.rewards.model:alone", "vllm": "qrpo.rewards.pooling:PoolingReward"}[
            config.engine
        ]
        env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if config.engine == "transformers":
            env |= {name: value for name, value in KEEP_MEMORY.items() if name not in os.environ}
        self._child = Child(target, config, name=f"reward model {config.model.path}", log=log, env=env)

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One score per completion, in order."""
        if not completions:
            return []
        scores: list[Score] = self._child.call("score", list(prompts), list(completions))
        return scores

    def close(self) -> None:
        """End the child process."""
        self._child.close()


def alone(config: ModelRewardConfig) -> ModelReward:
    """A reward model in a process that does nothing else.

    It starts without two packages that transformers imports wherever they are installed, and that no score comes from:
    that is a fifth of the start. A model with code of its own may want them.
    """
    if not config.model.trust_remote_code:
        for package in ("scipy", "sklearn"):
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # how Python notes what is not there
    return ModelReward(config)


def encode_rows(
    tokenizer: Any, prompts: Sequence[Messages], completions: Sequence[str], max_length: int
) -> tuple[dict[int, list[int]], dict[int, Score]]:
    """Token ids of the rows that can be scored, by place, and the errors of the others."""
    encoded: dict[int, list[int]] = {}
    refused: dict[int, Score] = {}
    conversations = [
        [*prompt, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    for row, ids in enumerate(encode_conversations(tokenizer, conversations)):
        if isinstance(ids, DataError):
            refused[row] = Score(None, str(ids))
        elif len(ids) > max_length:
            refused[row] = Score(
                None, f"the conversation has {len(ids)} tokens, but the reward model reads {max_length}"
            )
        else:
            encoded[row] = ids
    return encoded, refused


def _batch_rows(lengths: Sequence[int], budget: int) -> int:
    """How many of these rows, longest first, make the next batch: within the budget, and hardly any padding.

    A batch ends early before a row that would be padding by more than a fifth, as among the few longest: a smaller
    batch costs less than to compute what nobody reads.
    """
    most = max(1, budget // lengths[0])
    return next(
        (rows for rows in range(1, min(most, len(lengths))) if lengths[rows] < 0.8 * lengths[0]), most
    )


def not_one_score(path: str, got: int) -> str:
    """The message for a classifier."""
    return f"{path} gives {got} scores, expected a reward model with one: a classifier's labels are no reward"


def as_score(reward: float) -> Score:
    """The model's number as a score, an error where it is not finite."""
    if reward != reward or reward in (float("inf"), float("-inf")):
        return Score(None, f"the reward model's score is {reward}, expected a finite number")
    return Score(reward)


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA and its kin raise torch.OutOfMemoryError, the CPU's allocator a RuntimeError of this wording."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
