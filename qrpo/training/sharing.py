"""A prompt's forward shared by its completions: one row holds the prompt once, and the completions one after another.

    row        prompt | completion 1 | completion 2 | ...
    positions  0..p-1 | p, p+1, ...  | p, p+1, ...  | ...
    attention  causal, to the prompt and to a token's own completion

Every completion sees what it sees in a row of its own, so log-probabilities and gradients are the same up to rounding, and (K - 1) of K
forwards of the prompt are saved. What it takes is a model that follows such a mask and such positions: attention by torch's
`scaled_dot_product_attention` in every layer, without a sliding window. `can_share` asks the model itself, on a few tokens. The
price is attention over a longer row, most of it masked, so rows stay within the token budget and prompts that
save little are not shared.
"""

from collections.abc import Sequence
from typing import Any

import torch

from qrpo.training.batches import length_sorted_batches

__all__ = ["can_share", "saved_tokens", "shared_batches", "worth_sharing"]

WORTH = 0.1
"""Share of all tokens that must be saved: masked attention takes some of it back."""


def can_share(model: Any) -> bool:
    """Whether this causal language model computes the same log-probabilities with and without sharing."""
    from qrpo.training.logprobs import completion_logprobs

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if (
        config._attn_implementation != "sdpa"
        or kinds != {"full_attention"}
        or getattr(config, "sliding_window", None)
    ):
        return False
    ids = [token % config.vocab_size for token in (11, 7, 5, 13, 3, 17, 2, 19)]
    prompt, completions = ids[:5], [ids[5:], ids[4:7], ids[2:6]]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart, shared = (
                completion_logprobs(model, [prompt] * 3, completions, share_prompts=share)
                for share in (False, True)
            )
    except (TypeError, ValueError, RuntimeError):  # a model without positions, or whose mask is another
        return False
    finally:
        model.train(training)
    rounding = 0.05 if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool(torch.allclose(apart, shared, rtol=rounding, atol=rounding))


def worth_sharing(prompts: Sequence[Any], completions: Sequence[Any]) -> bool:
    """Whether sharing leaves out enough of these rows' tokens; completions of a prompt follow each other, with the same list object."""
    return saved_tokens(prompts) >= WORTH * (sum(map(len, prompts)) + sum(map(len, completions)))


def saved_tokens(prompts: Sequence[Any]) -> int:
    """Prompt tokens that need no forward where each prompt is shared."""
    return sum(len(prompts[i]) for i in range(1, len(prompts)) if prompts[i] is prompts[i - 1])


def shared_batches(
    prompts: Sequence[Any], completions: Sequence[Any], token_budget: int, group: int = 1
) -> list[list[int]]:
    """Like `length_sorted_batches`, of rows that share a prompt: as many of its completions as the budget holds, whole groups."""
    units: list[list[int]] = []
    lengths: list[int] = []
    for start in range(0, len(prompts), group):
        places = list(range(start, start + group))
        said = sum(len(completions[place]) for place in places)
        same = units and prompts[start] is prompts[units[-1][0]]
        if same and lengths[-1] + said <= token_budget:
            units[-1] += places
            lengths[-1] += said
        else:
            units.append(places)
            lengths.append(len(prompts[start]) + said)
    return [
        [place for unit in batch for place in units[unit]]
        for batch in length_sorted_batches(lengths, token_budget)
    ]
