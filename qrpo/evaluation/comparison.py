"""The best of several models or training settings, chosen on one half of the prompts and reported
on the other half.

The best of many looks better than it is on the prompts that chose it. The paper selects the same
way. A hash of the prompt's id decides the half, so every model, run and machine uses the same
halves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qrpo.errors import DataError
from qrpo.evaluation.statistics import Floats, bootstrap_interval, seeds_and_prompts
from qrpo.seeds import seeded_hash


@dataclass(frozen=True)
class Choice:
    """The best candidate, and its score on prompts that did not choose it."""

    best: str
    selected_by: dict[str, float]
    """Every candidate's mean on the half that chose."""
    reported: dict[str, float]
    """The best one's `mean`, `low` and `high` (95%) on the other half."""
    selection_prompts: int
    report_prompts: int


@dataclass(frozen=True)
class Contender:
    """One setting of a method: scores (S, P) by name, of S training seeds and P prompts."""

    settings: Mapping[str, Any]
    scores_SP: Mapping[str, Floats]


def selection_half(prompt_ids: Sequence[str], seed: int = 0) -> npt.NDArray[np.bool_]:
    """Which prompts (P,) choose; the others report. Half of them, rounded down."""
    digests = [seeded_hash("selection", seed, prompt_id) for prompt_id in prompt_ids]
    chosen = np.zeros(len(prompt_ids), dtype=bool)
    chosen[sorted(range(len(digests)), key=digests.__getitem__)[: len(digests) // 2]] = True
    return chosen


def choose_best(scores: Mapping[str, Floats], prompt_ids: Sequence[str], *, seed: int = 0) -> Choice:
    """The candidate with the highest mean score on one half of the prompts, reported on the other.

    `scores` holds one value per prompt (P,) for each candidate: mean rewards or win rates; higher
    is better. The first of equals wins. Raises DataError for fewer than two prompts, no candidate,
    or scores of another number of prompts.
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


def compare_methods(
    contenders: Mapping[str, Sequence[Contender]],
    prompt_ids: Sequence[str],
    *,
    select_by: str = "reward",
    seed: int = 0,
) -> dict[str, Any]:
    """Compare training methods, each with its best setting. For each method, in order:

    - `settings` of its best contender, and `tried`: each setting with its mean on the half that
      chooses.
    - `scores` of the best on the other half: `mean`, `standard_error` over seeds, `low` and `high`
      (95%).
    - `behind`: the lead of the first method's best in `select_by`, prompt by prompt, with the same
      interval.

    Raises DataError if scores have different prompts, or fewer than two.
    """
    shapes = {one.scores_SP[select_by].shape for tried in contenders.values() for one in tried}
    if len(prompt_ids) < 2 or not shapes or {prompts for _, prompts in shapes} != {len(prompt_ids)}:
        raise DataError(
            f"comparison: got scores of shapes {sorted(shapes)} for {len(prompt_ids)} prompts, expected (seeds, prompts) "
            "of at least two prompts, the same for every contender"
        )
    chosen = selection_half(prompt_ids, seed)
    report: dict[str, Any] = {}
    first_SP: Floats | None = None
    for method, tried in contenders.items():
        means = [float(one.scores_SP[select_by][:, chosen].mean()) for one in tried]
        best = tried[int(np.argmax(means))]
        report[method] = {
            "settings": dict(best.settings),
            "scores": {
                name: seeds_and_prompts(values_SP[:, ~chosen], seed=seed)
                for name, values_SP in best.scores_SP.items()
            },
            "tried": [
                {"settings": dict(one.settings), select_by: mean}
                for one, mean in zip(tried, means, strict=True)
            ],
        }
        best_SP = best.scores_SP[select_by][:, ~chosen]
        if first_SP is None:
            first_SP = best_SP
        else:
            report[method]["behind"] = seeds_and_prompts(first_SP - best_SP, seed=seed)
    return {"select_by": select_by, "prompts": int((~chosen).sum()), "methods": report}
