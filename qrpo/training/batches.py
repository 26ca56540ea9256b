"""Rows of like length share a batch, within a budget of tokens: little is padded, and memory is bounded."""

from collections.abc import Sequence

__all__ = ["length_sorted_batches"]

# A batch of this many tokens does not gain from rows shorter than this share of its longest.
BUSY_TOKENS, LIKE_LENGTH = 2048, 0.8


def length_sorted_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut rows into batches of like length: indices into `lengths`, longest rows first.

    A batch padded to its longest row holds at most `token_budget` tokens; a row longer than that is a batch of its own. A batch
    that is large enough to keep the hardware busy takes no rows much shorter than its longest, so a step that is small beside the
    budget is not padded for nothing.
    Longest first, so that what does not fit into memory fails at once.
    """
    if token_budget < 1:
        raise ValueError(f"expected a token budget of at least 1, got {token_budget}")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # Sorted descending: the first row of a batch is its longest.
        longest, rows = (lengths[batches[-1][0]], len(batches[-1])) if batches else (0, 0)
        fits = rows and longest * (rows + 1) <= token_budget
        wasteful = longest * rows >= BUSY_TOKENS and lengths[index] < LIKE_LENGTH * longest
        if fits and not wasteful:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
