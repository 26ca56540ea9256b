"""Rewards that are Hugging Face sequence-classification models with one score.

The model reads the whole conversation through its own chat template. Completions are sorted by length and batched up
to a number of tokens, padding included, so little of a batch is padding; results come back in the order given and do
not depend on the batch beyond floating-point rounding. Scores are float32 whatever the model's precision.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from qrpo.chat import Messages, encode_conversation, load_tokenizer
from qrpo.child import Child
from qrpo.config import Section, knob
from qrpo.errors import DataError, ModelError
from qrpo.models import ModelConfig, context_length, load_reward_model
from qrpo.rewards.protocol import Columns, Score

__all__ = ["ChildModelReward", "ModelReward", "ModelRewardConfig"]

logger = logging.getLogger(__name__)


class ModelRewardConfig(Section):
    """A reward that is a sequence-classification model."""

    kind: Literal["model"] = "model"
    """Says that this reward is a Hugging Face model."""
    name: str = Field("reward", min_length=1)
    """What its values are called among the components of a sum."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Its factor in a sum of several rewards."""
    model: ModelConfig
    """The model; float32 where memory allows, since bfloat16 turns some pairs round."""
    max_length: int | None = Field(None, ge=1)
    """Longest conversation in tokens, by default the model's context; longer ones fail rather than lose their end."""
    batch_tokens: int = knob(16384, ge=1)
    """Tokens per batch, padding included; halved when memory runs out."""
    device: str | None = knob(None)
    """Where it runs: `cpu`, `cuda`, `cuda:1`; by default the first GPU where there is one."""


class ModelReward:
    """A loaded reward model and its tokenizer."""

    def __init__(self, config: ModelRewardConfig):
        self._tokenizer = load_tokenizer(config.model)
        self._max_length = config.max_length or context_length(config.model)
        self._model = load_reward_model(config.model, config.device)
        self._path = config.model.path
        # a model with code of its own may have several and still give one score: seen when it is run
        if (labels := self._model.config.num_labels) != 1 and not config.model.trust_remote_code:
            raise ModelError(_not_one_score(self._path, labels))
        self._batch_tokens = config.batch_tokens

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One score per completion, in order; rows that are too long or that the template refuses have an error."""
        scores: dict[int, Score] = {}
        encoded: dict[int, list[int]] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                ids = encode_conversation(
                    self._tokenizer, [*prompt, {"role": "assistant", "content": completion}]
                )
            except DataError as error:
                scores[row] = Score(None, str(error))
                continue
            if len(ids) > self._max_length:
                scores[row] = Score(
                    None,
                    f"the conversation has {len(ids)} tokens, but the reward model reads {self._max_length}",
                )
            else:
                encoded[row] = ids
        waiting = sorted(
            encoded, key=lambda row: len(encoded[row]), reverse=True
        )  # what needs most memory first
        while waiting:
            batch = self._next_batch(waiting, encoded)
            rewards = self._forward([encoded[row] for row in batch])
            if rewards is None:
                continue  # with half the budget
            scores |= zip(batch, map(_as_score, rewards), strict=True)
            del waiting[: len(batch)]
        return [scores[row] for row in range(len(completions))]

    def _next_batch(self, waiting: list[int], encoded: dict[int, list[int]]) -> list[int]:
        longest = len(encoded[waiting[0]])
        return waiting[: max(1, self._batch_tokens // longest)]

    def _forward(self, ids: list[list[int]]) -> list[float] | None:
        """The model's scores for one padded batch; None if memory ran out and a smaller batch should be tried."""
        import torch

        longest = max(map(len, ids))
        pad = self._padding(ids)
        input_ids_BT = torch.full((len(ids), longest), pad, dtype=torch.long)
        mask_BT = torch.zeros((len(ids), longest), dtype=torch.long)
        for row, sequence in enumerate(ids):
            input_ids_BT[row, : len(sequence)] = torch.as_tensor(sequence)
            mask_BT[row, : len(sequence)] = 1
        device = self._model.device
        try:
            with torch.inference_mode():
                output = self._model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device))
                # multi-objective models (ArmoRM) combine their objectives in `score`
                found = output.score if getattr(output, "score", None) is not None else output.logits
                found = found.float().reshape(len(ids), -1).cpu()
        except torch.OutOfMemoryError:
            if len(ids) == 1:
                raise ModelError(
                    f"the reward model runs out of memory on one conversation of {longest} tokens: lower max_length, or "
                    "load it in bfloat16"
                ) from None
            self._batch_tokens = longest * max(1, len(ids) // 2)
            logger.warning("reward model out of memory: batch_tokens is now %d", self._batch_tokens)
            torch.cuda.empty_cache()
            return None
        if found.shape[1] != 1:
            raise ModelError(_not_one_score(self._path, found.shape[1]))
        return found[:, 0].tolist()  # type: ignore[no-any-return]

    def _padding(self, ids: list[list[int]]) -> int:
        """The id to pad with, which the model reads its own way: it scores the last token that is another.

        A model without one is used on single sequences by its users and scores the last token whatever it is. The
        same comes of padding with an id that is in none of the sequences.
        """
        text_config = self._model.config.get_text_config()
        if text_config.pad_token_id is not None and not getattr(self, "_pads_freely", False):
            return int(text_config.pad_token_id)
        self._pads_freely = True
        used = {token_id for sequence in ids for token_id in sequence}
        text_config.pad_token_id = next(
            token_id for token_id in range(text_config.vocab_size) if token_id not in used
        )
        return int(text_config.pad_token_id)


class ChildModelReward:
    """A reward model in a child process, as the `Reward` protocol wants it."""

    def __init__(self, config: ModelRewardConfig, log: Path | None = None):
        self._child = Child(
            "qrpo.rewards.model:ModelReward", config, name=f"reward model {config.model.path}", log=log
        )

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One score per completion, in order."""
        scores: list[Score] = self._child.call("score", prompts, completions, {})
        return scores

    def close(self) -> None:
        """End the child process."""
        self._child.close()


def _not_one_score(path: str, got: int) -> str:
    return f"{path} gives {got} scores, expected a reward model with one: a classifier's labels are no reward"


def _as_score(reward: float) -> Score:
    if reward != reward or reward in (float("inf"), float("-inf")):
        return Score(None, f"the reward model's score is {reward}, expected a finite number")
    return Score(reward)
