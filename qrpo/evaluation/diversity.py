"""Diversity of a model's samples of one prompt. A collapsed policy always gives the same answer.

    unique            share of different samples among a prompt's samples
    distinct_1, _2    share of different tokens, and bigrams, in a prompt's samples (Li et al. 2016)
    self_similarity   mean Jaccard overlap of the bigrams of two samples; 1: all equal, 0: nothing
                      shared

All are counts of tokens; no model is needed. Compare only values from the same number of samples
per prompt.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from qrpo.evaluation.statistics import Ints, mean_by_prompt


def diversity(samples: Sequence[Sequence[Hashable]], prompt: Ints) -> dict[str, dict[str, float]]:
    """Each measure's mean over prompts and standard error; NaN if no prompt has enough data (two
    samples, a bigram).

    `samples` are token ids (or words) of S completions, `prompt` (S,) numbers their prompts.
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
    bigrams = [list(pairwise(tokens)) for tokens in whole]
    sets = [frozenset(some) for some in bigrams]
    overlaps = [len(a & b) / len(a | b) for a, b in combinations(sets, 2) if a or b]
    return {
        "unique": len(set(whole)) / len(whole),
        "distinct_1": _share_distinct(whole),
        "distinct_2": _share_distinct(bigrams),
        "self_similarity": float(np.mean(overlaps)) if overlaps else float("nan"),
    }


def _share_distinct(grams: Sequence[Sequence[Any]]) -> float:
    every = [gram for some in grams for gram in some]
    return len(set(every)) / len(every) if every else float("nan")
