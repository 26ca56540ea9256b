"""The best of several models, chosen on one half of the prompts and reported on the other, as the paper does.

The best of many on the prompts that it was chosen by looks better than it is. Halves are drawn by a hash of each prompt's
id, so that every model, run and machine cuts the same prompts the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qrpo.errors import DataError
from qrpo.evaluation.statistics import Floats, bootstrap_interval
from qrpo.seeds import seeded_hash

__all__ = ["Choice", "choose_best", "selection_half"]


@dataclass(frozen=True)
class Choice:
    """Which candidate is best, and what it is worth on prompts that had no say in it."""

    best: str
    selected_by: dict[str, float]
    """Every candidate's mean on the half that chose."""
    reported: dict[str, float]
    """The best one's `mean`, `low` and `high` (95%) on the other half."""
    selection_prompts: int
    report_prompts: int


def selection_half(prompt_ids: Sequence[str], seed: int = 0) -> npt.NDArray[np.bool_]:
    """Which prompts (P,) choose; the others report. Exactly half of them, the odd one reporting."""
    digests = [seeded_hash("selection", seed, prompt_id) for prompt_id in prompt_ids]
    chosen = np.zeros(len(prompt_ids), dtype=bool)
    chosen[sorted(range(len(digests)), key=digests.__getitem__)[: len(digests) // 2]] = True
    return chosen


def choose_best(scores: Mapping[str, Floats], prompt_ids: Sequence[str], *, seed: int = 0) -> Choice:
    """The candidate with the highest mean score on one half of the prompts, reported on the other.

    `scores` has one value a prompt (P,) for each candidate: mean rewards, or win rates; higher is better. Of equals the
    first wins. Raises DataError where there are fewer than two prompts, candidates of other lengths, or none.
    """
    if len(prompt_ids) < 2 or not scores or any(len(own) != len(prompt_ids) for own in scores.values()):
        lengths = {name: len(own) for name, own in scores.items()}
        raise DataError(
            f"selection: got scores of {lengths or 'no candidate'} for {len(prompt_ids)} prompts, expected at least "
            "two prompts and one score of each for every candidate"
        )
    chosen = selection_half(prompt_ids, seed)
    means = {name: float(np.mean(own[chosen])) for name, own in scores.items()}
    best = max(means, key=means.__getitem__)
    rest = np.asarray(scores[best])[~chosen]
    low, high = bootstrap_interval(rest, seed=seed)
    reported = {"mean": float(rest.mean()), "low": low, "high": high}
    return Choice(best, means, reported, int(chosen.sum()), int((~chosen).sum()))
