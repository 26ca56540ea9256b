"""Means, win rates, KL and their intervals over prompts.

Samples of one prompt are correlated, so standard errors and intervals are over prompts, never over
samples. All functions are pure, on NumPy arrays with one entry per sample: `values`, and `prompt`,
integers that number the prompts.

    win rate   P(policy's reward > reference's), ties a half, over all pairs of samples of the same
               prompt
    KL         E_policy[log pi - log ref], from the policy's samples: unbiased; may be negative by
               chance
    k3         E_policy[ref/pi - 1 + log pi - log ref]: never negative, same expectation (Schulman
               2020)
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
RESAMPLES = 2000


def prompt_means(values: Floats, prompt: Ints) -> Floats:
    """Each prompt's mean, prompts ascending; NaN values are excluded."""
    known = ~np.isnan(values)
    _, index = np.unique(prompt[known], return_inverse=True)
    return np.bincount(index, weights=values[known]) / np.bincount(index)


def mean_by_prompt(values: Floats, prompt: Ints) -> dict[str, float]:
    """`mean` and `standard_error` over prompts of each prompt's mean; NaN values are excluded."""
    means = prompt_means(values, prompt)
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    return {"mean": float(means.mean()) if len(means) else float("nan"), "standard_error": error}


def sample_pairs(prompt: Ints, ref_prompt: Ints) -> tuple[Ints, Ints]:
    """Indices (I, J) of all pairs of a sample and a reference sample of the same prompt."""
    order, ref_order = np.argsort(prompt, kind="stable"), np.argsort(ref_prompt, kind="stable")
    begin = np.searchsorted(ref_prompt[ref_order], prompt[order], side="left")
    end = np.searchsorted(ref_prompt[ref_order], prompt[order], side="right")
    counts = end - begin
    shift = np.repeat(begin - (np.cumsum(counts) - counts), counts)
    return np.repeat(order, counts), ref_order[np.arange(counts.sum()) + shift]


def win_rates(reward: Floats, prompt: Ints, ref_reward: Floats, ref_prompt: Ints) -> Floats:
    """The share of pairs won, ties a half, for each prompt that both have, prompts ascending."""
    mine, theirs = sample_pairs(prompt, ref_prompt)
    won = (reward[mine] > ref_reward[theirs]) + 0.5 * (reward[mine] == ref_reward[theirs])
    return prompt_means(won, prompt[mine])


def kl_estimates(log_ratio: Floats, prompt: Ints) -> dict[str, Any]:
    """KL(policy || reference) in nats per completion, from log pi - log ref (S,) of S samples of
    the policy.

    `mean` and `standard_error` are of the plain estimator named in `estimator`; `k3` is the
    non-negative one.
    """
    plain = mean_by_prompt(log_ratio, prompt)
    k3 = mean_by_prompt(np.expm1(-log_ratio) + log_ratio, prompt)["mean"]
    return {**plain, "k3": k3, "estimator": "mean log pi - log ref over the policy's samples"}


def bootstrap_interval(values: Floats, *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap percentile interval (95%) of the mean of `values`, one value per prompt."""
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[rng.integers(0, len(values), (rows, len(values)))].mean(axis=1)
            for rows in np.full(RESAMPLES // 100, 100)  # a hundred at a time, to limit memory
        ]
    )
    return _percentiles(means)


def seeds_and_prompts(values_SP: Floats, *, seed: int = 0) -> dict[str, float]:
    """The mean over S training seeds and P prompts, with the uncertainty that both contribute.

    `values_SP` has one value per seed and prompt (mean reward, win rate), all seeds on the same
    prompts. `standard_error` is over seeds; `low` and `high` come from resampling seeds and prompts
    independently with replacement. With 3 seeds such intervals of 95% cover only 77 to 89%.
    """
    seeds, prompts = values_SP.shape
    rng = np.random.default_rng(seed)
    means = np.array(
        [
            values_SP[rng.integers(0, seeds, seeds)].mean(axis=0)[rng.integers(0, prompts, prompts)].mean()
            for _ in range(RESAMPLES)
        ]
    )
    low, high = _percentiles(means)
    by_seed = values_SP.mean(axis=1)
    error = float(by_seed.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else float("nan")
    return {"mean": float(by_seed.mean()), "standard_error": error, "low": low, "high": high}


def _percentiles(means: Floats) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
