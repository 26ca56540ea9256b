"""Forward passes within a token budget, so that memory is bounded and little is padded.

Packed rows (`qrpo.training.packing`) are filled by first fit, longest conversation first. Padded
rows are sorted, so that a batch has rows of similar length.
"""

from collections.abc import Sequence
from typing import Any, Literal

Layout = Literal["padded", "packed", "shared"]

# A batch with this many tokens does not gain from rows shorter than this fraction of its longest.
BUSY_TOKENS, SIMILAR_LENGTH = 2048, 0.8
WORTH_SHARING = 0.3
"""Minimum fraction of all tokens to save."""


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


def cut_batches(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    token_budget: int,
    layout: Layout,
    group: int = 1,
    window: int | None = None,
) -> tuple[list[list[int]], Layout]:
    """Cut conversations into forward passes: indices of each, longest first, and the layout that
    they are for.

    Completions of a prompt are neighbours with the same list object as prompt. `group` neighbours
    stay together. The layout is `layout`, or a simpler one where that does not pay, or where a
    conversation is longer than `window`, the model's attention window.
    """
    if token_budget < 1:
        raise ValueError(f"expected a token budget of at least 1, got {token_budget}")
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    if window is not None and max(lengths, default=0) > window:
        layout = "padded"
    if layout == "shared" and saved_tokens(prompts) < WORTH_SHARING * sum(lengths):
        layout = "packed"
    units = [list(range(start, start + group)) for start in range(0, len(prompts), group)]
    if layout == "padded":
        longest = [max(lengths[i] for i in unit) for unit in units]
        batches = length_sorted_batches(longest, max(1, token_budget // group))
    else:
        if layout == "shared":
            units = _joined(units, prompts, lengths, token_budget)
        sizes = [sum(lengths[i] for i in unit) for unit in units]
        if layout == "shared":
            sizes = [
                n - saved_tokens([prompts[i] for i in unit]) for n, unit in zip(sizes, units, strict=True)
            ]
        batches = _first_fit(sizes, token_budget)
    return [[i for unit in batch for i in units[unit]] for batch in batches], layout


def _joined(
    units: list[list[int]], prompts: Sequence[Any], lengths: Sequence[int], token_budget: int
) -> list[list[int]]:
    """Join the units of a prompt as long as they fit into the budget together."""
    joined: list[list[int]] = []
    size = 0
    for unit in units:
        prompt = prompts[unit[0]]
        added = sum(lengths[i] - len(prompt) for i in unit)
        if joined and prompt is prompts[joined[-1][0]] and size + added <= token_budget:
            joined[-1] += unit
            size += added
        else:
            joined.append(list(unit))
            size = len(prompt) + added
    return joined


def _first_fit(sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of sizes in packs of at most `token_budget`, largest first; a larger one is a pack by
    itself."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for number, room in enumerate(rooms):
            if sizes[index] <= room:
                packs[number].append(index)
                rooms[number] -= sizes[index]
                break
        else:
            packs.append([index])
            rooms.append(token_budget - sizes[index])
    return packs


def saved_tokens(prompts: Sequence[Any]) -> int:
    """Prompt tokens that need no forward if each prompt is shared."""
    return sum(len(prompts[i]) for i in range(1, len(prompts)) if prompts[i] is prompts[i - 1])
