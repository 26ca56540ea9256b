"""Before the first step the policy is its reference: log pi - log ref of the data is zero up to rounding, or the data is another model's.

Reference log-probabilities are computed once and kept, so they can come from other weights, another chat template or another
tokenizer than the training starts with. A quick look at the first rows finds it before anything is learned from them, and the
tokens often tell which it is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qrpo.data.chat import foreign_tokens
from qrpo.errors import TrainingError
from qrpo.training.batches import length_sorted_batches
from qrpo.training.rows import flatten_rows, take, tensor_of

if TYPE_CHECKING:
    from qrpo.training.trainer import CompletionTrainer

__all__ = ["ROUNDING", "check_reference"]

# How far rounding alone carries the mean |log pi - log ref|, per square root of a token.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_reference(trainer: "CompletionTrainer", rows: Sequence[Any]) -> None:
    """Log how far the policy is from `ref_logprob` of some of these rows; TrainingError, with the reason, where it is too far."""
    columns = flatten_rows(rows)
    seen = max(
        max(ids, default=0) for name in ("prompt_token_ids", "completion_token_ids") for ids in columns[name]
    )
    if seen >= trainer.model.config.get_text_config().vocab_size:
        raise TrainingError(
            f"before the first step: token {seen} is not in the model. {_mismatch(trainer, rows)}"
        )
    # The last batch holds the shortest: a quick look, within the memory that the step needs anyway.
    shown = length_sorted_batches(columns["length"], trainer.args.token_budget)[-1][:64]
    batch = take(columns, shown)
    trainer.model.eval()
    with torch.no_grad():
        logprob_B = trainer.logprobs(trainer.model, batch)
    ratio_B = (logprob_B - tensor_of(batch["ref_logprob"], logprob_B)).abs()
    tokens_B = tensor_of([len(ids) for ids in batch["completion_token_ids"]], logprob_B)
    drift = (ratio_B / tokens_B.clamp(min=1).sqrt()).mean().item()
    limit = trainer.args.max_initial_log_ratio
    if limit is None:
        limit = ROUNDING[trainer.compute_dtype()]
    mean, largest = ratio_B.mean().item(), ratio_B.max().item()
    trainer.log({"initial_log_ratio/mean_abs": mean, "initial_log_ratio/max_abs": largest})
    # A NaN is left to the loss, which names its prompt.
    if drift > limit:
        raise TrainingError(
            f"before the first step, log pi - log ref of {len(shown)} completions has mean {mean:.4g} and maximum "
            f"{largest:.4g} in absolute value: {drift:.4g} per square root of a token, expected at most {limit:g}. "
            f"{_mismatch(trainer, rows)}. Compute the reference log-probabilities again from this model and its own tokens, "
            "or raise max_initial_log_ratio."
        )


def _mismatch(trainer: "CompletionTrainer", rows: Sequence[Any]) -> str:
    """What of the reference is another than the policy's, as far as the tokens tell."""
    for row in rows if trainer.processing_class is not None else ():
        if found := foreign_tokens(trainer.processing_class, row["prompt_token_ids"]):
            return f"Prompt {row.get('prompt_id')}: {found}"
    return "The reference log-probabilities come from other weights than the model to be trained, or from other tokens"
