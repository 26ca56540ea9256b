"""Before the first step the policy equals its reference, so log pi - log ref of the data must be
zero up to rounding.

Reference log-probabilities are computed once and stored. They may come from other weights, another
chat template or another tokenizer than the training starts with. A check of the first rows finds
this before the weights change, and the tokens often show the cause.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qrpo.data.chat import foreign_tokens
from qrpo.errors import TrainingError
from qrpo.training.batches import length_sorted_batches
from qrpo.training.rows import TrainingRow, flatten_rows, take, tensor_of

__all__ = ["ROUNDING", "check_reference"]

# Mean |log pi - log ref| per square root of a token that rounding alone explains.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_reference(
    rows: Sequence[TrainingRow],
    logprobs: Callable[[dict[str, Any]], torch.Tensor],
    *,
    limit: float,
    token_budget: int,
    vocab_size: int,
    tokenizer: Any,
) -> tuple[float, float]:
    """Mean and maximum of |log pi - `ref_logprob`| over some of these rows; `logprobs` gives log pi
    (B,) of flattened rows.

    Raises TrainingError, with the cause as far as it is known, if the mean per square root of a
    token is above `limit`.
    """
    columns = flatten_rows(rows)
    largest_id = max(
        max(ids, default=0) for name in ("prompt_token_ids", "completion_token_ids") for ids in columns[name]
    )
    if largest_id >= vocab_size:
        raise TrainingError(
            f"before the first step: token {largest_id} is not in the model. {_mismatch(rows, tokenizer)}"
        )
    # The last batch has the shortest rows: a quick check within the memory that the step needs
    # anyway.
    checked = length_sorted_batches(columns["length"], token_budget)[-1][:64]
    batch = take(columns, checked)
    logprob_B = logprobs(batch)
    ratio_B = (logprob_B - tensor_of(batch["ref_logprob"], logprob_B)).abs()
    tokens_B = tensor_of([len(ids) for ids in batch["completion_token_ids"]], logprob_B)
    per_token = (ratio_B / tokens_B.clamp(min=1).sqrt()).mean().item()
    mean, largest = ratio_B.mean().item(), ratio_B.max().item()
    # A NaN passes: the loss will name its prompt.
    if per_token > limit:
        raise TrainingError(
            f"before the first step, log pi - log ref of {len(checked)} completions has mean {mean:.4g} and maximum "
            f"{largest:.4g} in absolute value: {per_token:.4g} per square root of a token, expected at most {limit:g}. "
            f"{_mismatch(rows, tokenizer)}. Compute the reference log-probabilities again from this model and its tokens, "
            "or raise max_initial_log_ratio."
        )
    return mean, largest


def _mismatch(rows: Sequence[TrainingRow], tokenizer: Any) -> str:
    """How the reference differs from the policy, as far as the tokens show it."""
    for row in rows if tokenizer is not None else ():
        if found := foreign_tokens(tokenizer, row["prompt_token_ids"]):
            return f"Prompt {row.get('prompt_id')}: {found}"
    return "The reference log-probabilities come from other weights than the model to train, or from other tokens"
