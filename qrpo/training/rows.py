"""Rows that a trainer reads: a prompt with K training completions, the columns of a shard.

| column | per row | |
|---|---|---|
| `prompt_token_ids` | list of int | up to where the assistant's turn begins |
| `completion_token_ids` | K lists of int | end token included |
| `ref_logprob` | (K,) | log-probability under the reference; for losses with a reference |
| `quantile_reward` | (K,) | in [0, 1]; for QRPO |
| `reward` | (K,) | for losses whose pairs it decides |
| `origin`, `sample_index` | (K,), optional | (`offline`, 0): the chosen one, 1: the rejected |
| `prompt_id` | optional | named in errors |
| `num_ref`, `ref_std` | optional | number and spread of the reference rewards |

They come from shards on disk through a reader, or from a dataset in one of TRL's formats in memory.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qrpo.data.chat import encode_completion, encode_prompt, encode_text
from qrpo.data.prompts import PromptsConfig, parse_row
from qrpo.errors import DataError
from qrpo.method.quantiles import quantile_rewards

log = logging.getLogger("qrpo")

TrainingRow = Mapping[str, Any]
PER_COMPLETION = ("completion_token_ids", "quantile_reward", "ref_logprob", "reward")
PER_PROMPT = ("prompt_token_ids", "prompt_id", "num_ref", "ref_std")


def collate_rows(rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """A batch is the rows unchanged: they become padded tensors one micro-batch at a time."""
    return {"rows": rows}


def select_completions(row: TrainingRow, indices: Sequence[int]) -> dict[str, Any]:
    """The row with only these of its completions, in this order."""
    return {**row, **{name: [row[name][i] for i in indices] for name in PER_COMPLETION if name in row}}


def flatten_rows(rows: Sequence[TrainingRow]) -> dict[str, list[Any]]:
    """Columns with one entry per completion, B = P * K entries, prompts repeated.

    Adds `length` (tokens of prompt and completion), `prompt_index` (of the row), and a `prompt_id`
    where there is none. Other columns that the first row lacks are skipped.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt_index", "length", "prompt_id")}
    columns |= {name: [] for name in (*PER_PROMPT, *PER_COMPLETION) if name in rows[0]}
    for i, row in enumerate(rows):
        completions = row["completion_token_ids"]
        row = {"prompt_id": f"row {i} of the step", **row}
        known = {
            "prompt_index": [i] * len(completions),
            "length": [len(row["prompt_token_ids"]) + len(ids) for ids in completions],
        }
        for name, column in columns.items():
            if name in PER_PROMPT:
                column += [row[name]] * len(completions)
                continue
            values = known[name] if name in known else row[name]
            if len(values) != len(completions):
                raise DataError(
                    f"prompt {row['prompt_id']}: {len(values)} values in {name!r}, expected one for each of the "
                    f"{len(completions)} completions"
                )
            column.extend(values)
    return columns


def take(columns: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
    """These entries of every column."""
    return {name: [column[i] for i in indices] for name, column in columns.items()}


def merge_columns(parts: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """The columns that all parts have, one part after the other; a prompt is one of its part."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    merged = {name: [value for part in parts for value in part[name]] for name in names}
    merged["prompt_index"] = [(i, prompt) for i, part in enumerate(parts) for prompt in part["prompt_index"]]
    return merged


def tensor_of(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A column as a tensor (B,) with the dtype and device of `like`."""
    return torch.as_tensor(np.asarray(values, dtype=np.float64), dtype=like.dtype, device=like.device)


def training_rows(dataset: Any, tokenizer: Any, needs: Sequence[str] = ("quantile_reward",)) -> Any:
    """`dataset` itself if it has training rows; a list of rows if it is in one of TRL's formats.

    TRL's formats are `prompt` + `completion`, `prompt` + `chosen` + `rejected`, `chosen` +
    `rejected`, or `messages`, each as strings (encoded as they are) or messages (encoded by the
    chat template). If the loss `needs` a `reward`, a row has one: a number, or one for chosen and
    one for rejected (also read from `chosen_reward` and `rejected_reward`). If it needs a
    `quantile_reward`, a row also has `ref_rewards`, the rewards of the reference's completions. A
    completion whose reward equals all of them has no rank: it is excluded, with a warning that says
    how many are. The result has no `ref_logprob`.
    """
    if hasattr(dataset, "iterate") or isinstance(dataset, torch.utils.data.IterableDataset):
        return dataset
    if not len(dataset):
        raise DataError("the training dataset is empty")
    if "prompt_token_ids" in dataset[0]:
        return dataset
    if tokenizer is None:
        raise DataError("a dataset of text needs a tokenizer: pass it as processing_class")
    rows = [_encode_row(dataset[i], i, tokenizer, needs) for i in range(len(dataset))]
    if excluded := sum(row.pop("num_excluded") for row in rows):
        log.warning(
            "%d completions are not trained on: their rewards equal all `ref_rewards` of their prompt",
            excluded,
        )
    return rows


def _encode_row(row: TrainingRow, index: int, tokenizer: Any, needs: Sequence[str]) -> dict[str, Any]:
    try:
        prompt = parse_row(row, PromptsConfig(source="memory"))
        messages, tools, texts = prompt.messages, prompt.tools, prompt.offline_completions
        if not texts:
            raise DataError("no completion to train on")
        columns = _reward_columns(json.loads(prompt.metadata), len(texts), needs)
        if prompt.conversational or tools:
            prompt_ids = encode_prompt(tokenizer, messages, tools)
            completion_ids = [encode_completion(tokenizer, messages, text, tools) for text in texts]
        else:
            both = [encode_text(tokenizer, messages[-1]["content"], text) for text in texts]
            prompt_ids, completion_ids = both[0][0], [ids for _, ids in both]
    except DataError as error:
        raise DataError(f"row {index} of the training dataset: {error}") from error
    tokens = {"prompt_token_ids": prompt_ids, "completion_token_ids": completion_ids}
    ranked = np.flatnonzero(columns.pop("ranked", np.ones(len(texts)))).tolist()
    encoded = {"prompt_id": prompt.prompt_id, **tokens, **columns}
    return select_completions(encoded, ranked) | {"num_excluded": len(texts) - len(ranked)}


def _reward_columns(given: Mapping[str, Any], completions: int, needs: Sequence[str]) -> dict[str, Any]:
    """The columns that rewards determine, as far as the loss needs them."""
    if not {"reward", "quantile_reward"} & set(needs):
        return {}
    names = ("chosen_reward", "rejected_reward") if "reward" not in given else ("reward",)
    if not all(name in given for name in names):
        raise DataError(f"no `reward`: got the columns {', '.join(given) or 'none'} in addition to the text")
    rewards = np.array([number for name in names for number in _numbers(name, given[name])])
    if len(rewards) != completions:
        raise DataError(f"{len(rewards)} rewards for {completions} completions")
    if "quantile_reward" not in needs:
        return {"reward": rewards}
    ref_rewards = _numbers("ref_rewards", given.get("ref_rewards") or [])
    if not ref_rewards:
        raise DataError("no `ref_rewards`: expected the rewards of completions sampled from the reference")
    return {
        "reward": rewards,
        "quantile_reward": quantile_rewards(rewards[None], [ref_rewards])[0].astype(np.float32),
        "ranked": (rewards != min(ref_rewards)) | (rewards != max(ref_rewards)),
        "num_ref": len(ref_rewards),
        "ref_std": float(np.std(ref_rewards, ddof=1)) if len(ref_rewards) > 1 else 0.0,
    }


def _numbers(column: str, value: Any) -> list[float]:
    """A number, or a list of numbers, of a column."""
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, (int, float)) or not abs(item) <= sys.float_info.max:
            raise DataError(f"{column}: got {item!r}, expected finite numbers; fix or remove the row")
    return [float(item) for item in values]
