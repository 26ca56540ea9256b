"""Batches of rows of similar length within a token budget, so that little is padded and memory is
bounded.

With shared prompts a row holds a prompt once and several of its completions (see
`qrpo.training.logprobs`). Attention then runs over a longer, mostly masked row, so rows stay within
the budget, and prompts that save little are not shared.
"""

from collections.abc import Sequence
from typing import Any

__all__ = ["length_sorted_batches", "saved_tokens", "shared_batches", "worth_sharing"]

# A batch with this many tokens does not gain from rows shorter than this fraction of its longest.
BUSY_TOKENS, SIMILAR_LENGTH = 2048, 0.8
WORTH_SHARING = 0.3
"""Minimum fraction of all tokens to save: masked attention takes some of it back."""


def length_sorted_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut rows into batches of similar length: indices into `lengths`, longest rows first.

    A batch padded to its longest row has at most `token_budget` tokens; a longer row is a batch by
    itself. A batch that is large enough to keep the hardware busy takes no rows much shorter than
    its longest, so a step that is smaller than the budget is not padded for nothing. The longest
    come first, so that what does not fit into memory fails at once.
    """
    if token_budget < 1:
        raise ValueError(f"expected a token budget of at least 1, got {token_budget}")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # Sorted descending: the first row of a batch is its longest.
        longest, rows = (lengths[batches[-1][0]], len(batches[-1])) if batches else (0, 0)
        fits = rows and longest * (rows + 1) <= token_budget
        wasteful = longest * rows >= BUSY_TOKENS and lengths[index] < SIMILAR_LENGTH * longest
        if fits and not wasteful:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def shared_batches(
    prompts: Sequence[Any], completions: Sequence[Any], token_budget: int, group: int = 1
) -> list[list[int]]:
    """As `length_sorted_batches`, of rows that each hold one prompt and as many of its completions
    as the budget allows.

    `group` neighbouring completions stay in one row.
    """
    rows: list[list[int]] = []
    lengths: list[int] = []
    for start in range(0, len(prompts), group):
        indices = list(range(start, start + group))
        added = sum(len(completions[index]) for index in indices)
        same = rows and prompts[start] is prompts[rows[-1][0]]
        if same and lengths[-1] + added <= token_budget:
            rows[-1] += indices
            lengths[-1] += added
        else:
            rows.append(indices)
            lengths.append(len(prompts[start]) + added)
    return [
        [index for row in batch for index in rows[row]]
        for batch in length_sorted_batches(lengths, token_budget)
    ]


def worth_sharing(prompts: Sequence[Any], completions: Sequence[Any]) -> bool:
    """Whether sharing saves enough tokens; completions of a prompt are neighbours with the same
    list object as prompt."""
    return saved_tokens(prompts) >= WORTH_SHARING * (sum(map(len, prompts)) + sum(map(len, completions)))


def saved_tokens(prompts: Sequence[Any]) -> int:
    """Prompt tokens that need no forward if each prompt is shared."""
    return sum(len(prompts[i]) for i in range(1, len(prompts)) if prompts[i] is prompts[i - 1])
