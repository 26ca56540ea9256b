"""Training methods against each other: each one's best setting, chosen on one half of the prompts and reported on the other.

Judged over several training seeds; intervals and differences are over seeds and prompts together (`qrpo.evaluation.statistics`), and
differences are taken prompt by prompt, for all methods answered the same ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrpo.errors import DataError
from qrpo.evaluation.selection import selection_half
from qrpo.evaluation.statistics import Floats, seeds_and_prompts

__all__ = ["Contender", "compare_methods"]


@dataclass(frozen=True)
class Contender:
    """One setting of a method: its scores by name, (S, P) of S training seeds and P held-out prompts."""

    settings: Mapping[str, Any]
    scores_SP: Mapping[str, Floats]


def compare_methods(
    contenders: Mapping[str, Sequence[Contender]],
    prompt_ids: Sequence[str],
    *,
    select_by: str = "reward",
    seed: int = 0,
) -> dict[str, Any]:
    """For each method, in order: `settings` of its best contender, `tried` (each setting and its mean on the choosing half),

    `scores` of the best on the other half (`mean`, `standard_error` over seeds, `low`, `high`: 95%), and `behind`: by how
    much the first method's best leads it in `select_by`, with the same interval. Raises DataError where scores do not have
    the same prompts, or there are fewer than two.
    """
    shapes = {one.scores_SP[select_by].shape for tried in contenders.values() for one in tried}
    if len(prompt_ids) < 2 or not shapes or {prompts for _, prompts in shapes} != {len(prompt_ids)}:
        raise DataError(
            f"comparison: got scores of shapes {sorted(shapes)} for {len(prompt_ids)} prompts, expected (seeds, prompts) "
            "of at least two prompts, the same for every contender"
        )
    chosen = selection_half(prompt_ids, seed)
    best: dict[str, Contender] = {}
    report: dict[str, Any] = {}
    for method, tried in contenders.items():
        means = [float(one.scores_SP[select_by][:, chosen].mean()) for one in tried]
        best[method] = tried[int(np.argmax(means))]
        scores = {
            name: seeds_and_prompts(values_SP[:, ~chosen], seed=seed)
            for name, values_SP in best[method].scores_SP.items()
        }
        report[method] = {
            "settings": dict(best[method].settings),
            "scores": scores,
            "tried": [
                {"settings": dict(one.settings), select_by: mean}
                for one, mean in zip(tried, means, strict=True)
            ],
        }
    first, *others = best
    for method in others:
        lead_SP = best[first].scores_SP[select_by][:, ~chosen] - best[method].scores_SP[select_by][:, ~chosen]
        report[method]["behind"] = seeds_and_prompts(lead_SP, seed=seed)
    return {"select_by": select_by, "prompts": int((~chosen).sum()), "methods": report}
