"""Rewards at equal length: is a better reward only a longer completion?

    win rate at equal length    P(win | dlength = 0) under logit P(win) = a + b tanh(dlength / std):
                                AlpacaEval 2's length term (Dubois et al. 2024), fitted to all pairs
                                of samples of the same prompt; prompts have equal weight
    reward gain at equal length d in reward = (one constant per prompt) + b length + d [policy]
    reward per token            the slope of reward on length among one model's samples of the same
                                prompt

Lengths are in tokens. Standard errors are clustered by prompt (sandwich estimator), with t
quantiles for the interval of the win rate. They describe the fit, not whether length causes the
reward.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qrpo.evaluation.statistics import Floats, Ints, sample_pairs

_SEPARATED = 12.0  # a larger log odds than any number of prompts can show


@dataclass(frozen=True)
class Slope:
    """The relation of reward to length among samples of the same prompt."""

    mean: float
    """Reward per token; 0 if all lengths of a prompt are equal."""
    standard_error: float
    correlation: float
    """Within prompts, in [-1, 1]; NaN if rewards or lengths do not vary."""


def compare_at_equal_length(
    reward: Floats, length: Floats, prompt: Ints, ref_reward: Floats, ref_length: Floats, ref_prompt: Ints
) -> dict[str, Any]:
    """A model's samples against the reference's, unadjusted and at equal length; plain numbers, for
    JSON.

    Keys: `win_rate` (`mean`, `low`, `high`, `confidence`), `reward_gain` and
    `reward_gain_unadjusted` (`mean`, `standard_error`), and `reward_per_token` of the `model` and
    the `reference`.
    """
    mine, theirs = sample_pairs(prompt, ref_prompt)
    won = (reward[mine] > ref_reward[theirs]) + 0.5 * (reward[mine] == ref_reward[theirs])
    shared, ref_shared = np.unique(mine), np.unique(theirs)
    is_model = np.repeat([1.0, 0.0], [len(shared), len(ref_shared)])
    rewards = np.concatenate([reward[shared], ref_reward[ref_shared]])
    lengths = np.concatenate([length[shared], ref_length[ref_shared]])
    prompts = np.concatenate([prompt[shared], ref_prompt[ref_shared]])
    gain, error = _within_prompts(rewards, np.stack([is_model, lengths], axis=1), prompts)
    raw, raw_error = _within_prompts(rewards, is_model[:, None], prompts)
    return {
        "win_rate": _win_rate(won, length[mine] - ref_length[theirs], prompt[mine]),
        "reward_gain": {"mean": float(gain[0]), "standard_error": float(error[0])},
        "reward_gain_unadjusted": {"mean": float(raw[0]), "standard_error": float(raw_error[0])},
        "reward_per_token": {
            "model": asdict(reward_per_token(reward, length, prompt)),
            "reference": asdict(reward_per_token(ref_reward, ref_length, ref_prompt)),
        },
    }


def reward_per_token(reward: Floats, length: Floats, prompt: Ints) -> Slope:
    """The slope and correlation of reward on length within prompts."""
    slope, error = _within_prompts(reward, length[:, None], prompt)
    x, y = _centred(length, prompt), _centred(reward, prompt)
    spread = np.sqrt((x @ x) * (y @ y))
    return Slope(float(slope[0]), float(error[0]), float(x @ y / spread) if spread > 0 else float("nan"))


def _win_rate(won: Floats, longer_by: Floats, prompt: Ints) -> dict[str, float]:
    """P(win) at equal length, by logistic regression with standard errors clustered by prompt.

    Where the likelihood has no maximum (a model that always wins), an additional prompt with a tie
    at each extreme of length keeps the fit finite. Elsewhere it would pull the slope to 0, and with
    few prompts leave much of the effect of length in the win rate.
    """
    from scipy.special import expit, stdtrit

    _, index, counts = np.unique(prompt, return_inverse=True, return_counts=True)
    spread = longer_by.std()
    x = np.tanh(longer_by / spread) if spread > 0 else np.zeros_like(longer_by)
    weight = 1 / counts[index]
    coefficients, error, finite = _logistic(x, won, weight, index)
    if not finite:
        x, won = np.append(x, [1.0, -1.0]), np.append(won, [0.5, 0.5])
        weight, index = np.append(weight, [0.5, 0.5]), np.append(index, [len(counts)] * 2)
        coefficients, error, _ = _logistic(x, won, weight, index)
    t = stdtrit(max(len(counts) - 1, 1), 0.975)
    low, mean, high = (float(expit(coefficients[0] + z * error)) for z in (-t, 0.0, t))
    return {"mean": mean, "low": low, "high": high, "confidence": 0.95}


def _logistic(x: Floats, won: Floats, weight: Floats, index: Ints) -> tuple[Floats, float, bool]:
    """Intercept and slope of won on x, the intercept's error, and whether the likelihood has a
    maximum."""
    from scipy.special import expit

    design = np.stack([np.ones_like(x), x], axis=1)
    coefficients = np.zeros(2)
    for _ in range(100):
        chance = expit(design @ coefficients)
        curvature = (design * (weight * chance * (1 - chance))[:, None]).T @ design
        step = np.linalg.pinv(curvature) @ (design.T @ (weight * (won - chance)))
        coefficients += step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-300))  # far steps overshoot
        if np.abs(step).max() < 1e-10 or np.abs(coefficients).max() > _SEPARATED:
            break
    error = _clustered_errors(design, weight * (won - expit(design @ coefficients)), curvature, index)[0]
    return coefficients, float(error), bool(np.abs(coefficients).max() <= _SEPARATED)


def _within_prompts(values: Floats, regressors: Floats, prompt: Ints) -> tuple[Floats, Floats]:
    """Least squares with one constant per prompt: coefficients and clustered errors, (R,) each."""
    design = np.stack([_centred(column, prompt) for column in regressors.T], axis=1)
    scale = np.sqrt((design**2).mean(axis=0))
    design = design / np.where(scale > 0, scale, 1.0)
    centred = _centred(values, prompt)
    curvature = design.T @ design
    coefficients = np.linalg.pinv(curvature) @ (design.T @ centred)
    index = np.unique(prompt, return_inverse=True)[1]
    errors = _clustered_errors(design, centred - design @ coefficients, curvature, index)
    unscale = np.where(scale > 0, scale, np.inf)
    return coefficients / unscale, errors / unscale


def _clustered_errors(design: Floats, residual: Floats, curvature: Floats, index: Ints) -> Floats:
    scores = np.stack([np.bincount(index, weights=column * residual) for column in design.T], axis=1)
    clusters = len(scores)
    if clusters < 2:
        return np.full(design.shape[1], np.nan)
    bread = np.linalg.pinv(curvature)
    variance = bread @ (scores.T @ scores) @ bread * clusters / (clusters - 1)
    errors: Floats = np.sqrt(np.diag(variance))
    return errors


def _centred(values: Floats, prompt: Ints) -> Floats:
    index = np.unique(prompt, return_inverse=True)[1]
    means = np.bincount(index, weights=values) / np.bincount(index)
    centred: Floats = values - means[index]
    return centred
