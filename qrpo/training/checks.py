"""What is checked before the first step: that the model can be trained on completions, and that the
policy equals its reference, so that log pi - log ref of the data is zero up to rounding.

Reference log-probabilities are computed once and stored. They may come from other weights, another
chat template or another tokenizer than the training starts with. A check of the first rows finds
this before the weights change, and the tokens often show the cause.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qrpo.data.chat import foreign_tokens
from qrpo.errors import ConfigError, TrainingError
from qrpo.training.batches import length_sorted_batches
from qrpo.training.rows import TrainingRow, flatten_rows, take, tensor_of

log = logging.getLogger("qrpo")

# Mean |log pi - log ref| per square root of a token that rounding alone explains.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_model(model: Any, learning_rate: float, masters: bool = False) -> None:
    """Raise ConfigError for prompt learning, freeze weights that text does not reach, and warn of
    weights that are too coarse to move (without float32 `masters`)."""
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise ConfigError(
                f"the adapter {name!r} is of type {config.peft_type.value}, which adds virtual tokens to the prompt: "
                "log-probabilities of completions do not see them. Use LoRA or another adapter inside the layers"
            )
    if model.config.get_text_config() is not model.config:
        # What a multimodal model has for other inputs gets no gradients, for which DDP and FSDP
        # would wait.
        parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        reached = {id(weight) for part in parts for weight in part.parameters()}
        for weight in model.parameters():
            weight.requires_grad_(weight.requires_grad and id(weight) in reached)
    # An optimizer such as Adam moves a weight by about the learning rate; a step below a quarter of
    # the dtype's epsilon, relative to the weight, is rounded away.
    stuck = total = 0
    for weight in model.parameters():
        if not masters and weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            smallest = learning_rate * 4 / torch.finfo(weight.dtype).eps
            stuck += int((weight.detach().abs() > smallest).sum())
            total += weight.numel()
    if stuck > total / 2:
        log.warning(
            "at a learning rate of %g, %.0f%% of the weights in %s stay as they are, because a step is smaller than their "
            "precision: load the model with dtype=torch.float32, and set bf16=True to compute in bfloat16",
            learning_rate,
            100 * stuck / total,
            str(model.dtype).removeprefix("torch."),
        )


def check_reference(
    rows: Sequence[TrainingRow],
    score: Callable[[dict[str, Any]], torch.Tensor],
    *,
    limit: float,
    token_budget: int,
    vocab_size: int,
    tokenizer: Any,
) -> tuple[float, float]:
    """Mean and maximum of |log pi - `ref_logprob`| over some of these rows; `score` gives log pi
    (B,) of flattened rows.

    Raises TrainingError, with the cause as far as it is known, if the mean per square root of a
    token is above `limit`.
    """
    columns = flatten_rows(rows)
    tokens = (ids for name in ("prompt_token_ids", "completion_token_ids") for ids in columns[name])
    if (largest_id := max(max(ids, default=0) for ids in tokens)) >= vocab_size:
        raise TrainingError(
            f"before the first step: token {largest_id} is not in the model. {_mismatch(rows, tokenizer)}"
        )
    # The last batch has the shortest rows: a quick check within the memory that the step needs
    # anyway.
    checked = length_sorted_batches(columns["length"], token_budget)[-1][:64]
    batch = take(columns, checked)
    logprob_B = score(batch)
    ratio_B = (logprob_B - tensor_of(batch["ref_logprob"], logprob_B)).abs()
    tokens_B = tensor_of([len(ids) for ids in batch["completion_token_ids"]], logprob_B)
    per_token = (ratio_B / tokens_B.clamp(min=1).sqrt()).mean().item()
    mean, largest = ratio_B.mean().item(), ratio_B.max().item()
    if per_token > limit:  # a NaN passes: the loss will name its prompt
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
