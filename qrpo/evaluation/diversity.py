"""How different a model's samples of one prompt are from each other: a policy that collapsed says the same every time.

    unique            share of a prompt's samples that differ from all before them
    distinct_1, _2    different tokens, and pairs of neighbouring tokens, over all of a prompt's samples (Li et al. 2016)
    self_similarity   mean Jaccard overlap of the token pairs of two samples of the prompt; 1: all alike, 0: nothing shared

Cheap on purpose: counts of tokens, no model. Compare only numbers from equally many samples a prompt.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from qrpo.evaluation.statistics import Ints, mean_by_prompt

__all__ = ["diversity"]


def diversity(samples: Sequence[Sequence[Hashable]], prompt: Ints) -> dict[str, dict[str, float]]:
    """Each measure's mean over prompts and standard error; NaN where no prompt has what it needs (two samples, a pair).

    `samples` are token ids (or words) of S completions, `prompt` (S,) tells their prompts apart.
    """
    groups: dict[int, list[Sequence[Hashable]]] = {}
    for tokens, one in zip(samples, prompt.tolist(), strict=True):
        groups.setdefault(one, []).append(tokens)
    measured = [_measures(group) for group in groups.values()]
    place = np.arange(len(measured))
    return {
        name: mean_by_prompt(np.array([row[name] for row in measured]), place)
        for name in ("unique", "distinct_1", "distinct_2", "self_similarity")
    }


def _measures(group: list[Sequence[Hashable]]) -> dict[str, float]:
    whole = [tuple(tokens) for tokens in group]
    pairs = [list(pairwise(tokens)) for tokens in whole]
    sets = [frozenset(some) for some in pairs]
    overlaps = [len(a & b) / len(a | b) for a, b in combinations(sets, 2) if a or b]
    return {
        "unique": len(set(whole)) / len(whole),
        "distinct_1": _share_distinct(whole),
        "distinct_2": _share_distinct(pairs),
        "self_similarity": float(np.mean(overlaps)) if overlaps else float("nan"),
    }


def _share_distinct(grams: Sequence[Sequence[Any]]) -> float:
    every = [gram for some in grams for gram in some]
    return len(set(every)) / len(every) if every else float("nan")
