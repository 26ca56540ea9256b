"""Rows that a trainer reads: a prompt with its K training completions, the columns of a training shard.

| column | per row | |
|---|---|---|
| `prompt_token_ids` | list of int | up to where the assistant begins to speak |
| `completion_token_ids` | K lists of int | end token included |
| `ref_logprob` | (K,) | log-probability under the reference; for losses that have one |
| `quantile_reward` | (K,) | in [0, 1]; QRPO |
| `reward` | (K,) | where it decides which completions make a pair |
| `origin`, `sample_index` | (K,), optional | tell the dataset's own chosen (`offline`, 0) and rejected (`offline`, 1) completions |
| `prompt_id`, `num_ref`, `ref_std` | optional | named in errors; size and spread of the reference sample |

They come from shards on disk through a reader, or from a dataset in one of TRL's formats held in memory.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qrpo.data.chat import encode_completion, encode_prompt
from qrpo.data.prompts import PromptsConfig, parse_row
from qrpo.errors import DataError
from qrpo.method.quantiles import quantile_rewards

__all__ = ["PER_COMPLETION", "Row", "collate_rows", "flatten_rows", "take", "tensor_of", "training_rows"]

Row = Mapping[str, Any]
PER_COMPLETION = ("completion_token_ids", "quantile_reward", "ref_logprob", "reward")
PER_PROMPT = ("prompt_token_ids", "prompt_id", "num_ref", "ref_std")


def collate_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """A batch is the rows as they are: they become padded tensors one micro-batch at a time."""
    return {"rows": rows}


def flatten_rows(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns with one entry per completion, B = P * K entries, prompts repeated; `length` counts prompt and completion tokens,
    `prompt_index` the rows.

    Columns that the first row lacks are left out, but for `prompt_id`, which falls back to the row's place.
    """
    computed = ("prompt_id", "prompt_index", "length")
    columns: dict[str, list[Any]] = {
        name: [] for name in (*PER_COMPLETION, *PER_PROMPT, *computed) if name in rows[0] or name in computed
    }
    for place, row in enumerate(rows):
        completions = row["completion_token_ids"]
        for name, column in columns.items():
            if name == "length":
                column.extend(len(row["prompt_token_ids"]) + len(completion) for completion in completions)
            elif name == "prompt_index":
                column.extend([place] * len(completions))
            elif name in PER_PROMPT:
                value = row.get(name, f"row {place} of the step") if name == "prompt_id" else row[name]
                column.extend([value] * len(completions))
            else:
                if len(row[name]) != len(completions):
                    raise DataError(
                        f"prompt {row.get('prompt_id', place)}: {len(row[name])} values in {name!r}, expected one for "
                        f"each of the {len(completions)} completions"
                    )
                column.extend(row[name])
    return columns


def take(columns: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
    """These entries of every column."""
    return {name: [column[i] for i in indices] for name, column in columns.items()}


def tensor_of(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A column as a tensor (B,) of `like`'s dtype, where that is."""
    return torch.as_tensor(np.asarray(values, dtype=np.float64), dtype=like.dtype, device=like.device)


def training_rows(dataset: Any, tokenizer: Any, needs: Sequence[str] = ("quantile_reward",)) -> Any:
    """`dataset` itself where it has training rows already; rows in a list where it is in one of TRL's formats.

    TRL's formats are `prompt` + `completion`, `prompt` + `chosen` + `rejected`, `chosen` + `rejected`, or `messages`,
    each as strings (encoded as they are) or messages (encoded by the chat template). Where the loss `needs` a
    `reward`, a row has one: a number, or one for chosen and one for rejected (also read from `chosen_reward` and
    `rejected_reward`); where it needs a `quantile_reward`, also `ref_rewards`, the rewards of the reference's
    completions. Such rows come without `ref_logprob`.
    """
    if hasattr(dataset, "iterate") or isinstance(dataset, torch.utils.data.IterableDataset):
        return dataset
    if not len(dataset):
        raise DataError("the training dataset is empty")
    if "prompt_token_ids" in dataset[0]:
        return dataset
    if tokenizer is None:
        raise DataError("a dataset of text needs a tokenizer: pass it as processing_class")
    return [_encode_row(dataset[place], place, tokenizer, needs) for place in range(len(dataset))]


def _encode_row(row: Row, place: int, tokenizer: Any, needs: Sequence[str]) -> dict[str, Any]:
    try:
        prompt = parse_row(row, PromptsConfig.model_validate({"source": "memory"}))
        if not prompt.offline_completions:
            raise DataError("no completion to train on")
        rewarded = _reward_columns(json.loads(prompt.metadata), len(prompt.offline_completions), needs)
        if prompt.conversational:
            prompt_ids = encode_prompt(tokenizer, prompt.messages)
            completion_ids = [
                encode_completion(tokenizer, prompt.messages, text) for text in prompt.offline_completions
            ]
        else:
            prompt_ids = list(tokenizer(prompt.messages[-1]["content"])["input_ids"])
            completion_ids = [
                [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                for text in prompt.offline_completions
            ]
    except DataError as error:
        raise DataError(f"row {place} of the training dataset: {error}") from error
    return {
        "prompt_id": prompt.prompt_id,
        "prompt_token_ids": prompt_ids,
        "completion_token_ids": completion_ids,
        **rewarded,
    }


def _reward_columns(columns: Mapping[str, Any], completions: int, needs: Sequence[str]) -> dict[str, Any]:
    """The columns that come from rewards, as far as the loss needs them."""
    if not {"reward", "quantile_reward"} & set(needs):
        return {}
    rewards = _rewards(columns)
    if len(rewards) != completions:
        raise DataError(f"{len(rewards)} rewards for {completions} completions")
    found: dict[str, Any] = {"reward": np.asarray(rewards, dtype=np.float32)}
    if "quantile_reward" in needs:
        ref_rewards = columns.get("ref_rewards")
        if not ref_rewards:
            raise DataError("no `ref_rewards`: expected the rewards of completions drawn from the reference")
        quantiles = quantile_rewards(np.asarray([rewards]), np.asarray([ref_rewards]))
        found["quantile_reward"] = np.asarray(quantiles[0], dtype=np.float32)
        found["num_ref"] = len(ref_rewards)
        found["ref_std"] = float(np.std(ref_rewards, ddof=1)) if len(ref_rewards) > 1 else 0.0
    return found


def _rewards(columns: Mapping[str, Any]) -> list[float]:
    if "reward" in columns:
        reward = columns["reward"]
        return [float(r) for r in reward] if isinstance(reward, list) else [float(reward)]
    if "chosen_reward" in columns and "rejected_reward" in columns:
        return [float(columns["chosen_reward"]), float(columns["rejected_reward"])]
    raise DataError(f"no `reward`: got the columns {', '.join(columns) or 'none'} beside the text")
