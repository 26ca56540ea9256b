"""Is a better reward only a longer completion? Rewards compared at equal length, and what a token is worth.

    win rate at equal length    P(win | dlength = 0) under logit P(win) = a + b tanh(dlength / std(dlength)), the length
                                term of AlpacaEval 2's length-controlled win rate (Dubois et al. 2024), fitted to all
                                pairs of samples of the same prompt; prompts count alike
    reward gain at equal length d in reward = (one constant a prompt) + b length + d [policy]
    reward per token            the slope of reward on length among one model's samples of the same prompt

Lengths are in tokens. Standard errors are robust to whatever samples of one prompt have in common (a sandwich, clustered
by prompt); they speak of the model's fit, not of whether length is the cause.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qrpo.evaluation.statistics import Floats, Ints, sample_pairs

__all__ = ["Slope", "compare_at_equal_length", "reward_per_token"]


@dataclass(frozen=True)
class Slope:
    """How reward goes with length among samples of the same prompt."""

    mean: float
    """Reward per token; 0 where all lengths of a prompt are equal."""
    standard_error: float
    correlation: float
    """Within prompts, in [-1, 1]; NaN where rewards or lengths do not vary."""


def compare_at_equal_length(
    reward: Floats, length: Floats, prompt: Ints, ref_reward: Floats, ref_length: Floats, ref_prompt: Ints
) -> dict[str, Any]:
    """A model's samples against the reference's, as they are and at equal length; plain numbers, for JSON.

    Keys: `win_rate` (`mean`, `low`, `high`, `confidence`), `reward_gain` and `reward_gain_unadjusted` (`mean`,
    `standard_error`), and `reward_per_token` of the `model` and the `reference`: the bias after and before.
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
    """P(win) at no difference in length, by logistic regression with standard errors clustered by prompt.

    One more prompt, whose two pairs are a tie at each extreme of length, keeps the fit finite where a model wins always.
    """
    _, place, counts = np.unique(prompt, return_inverse=True, return_counts=True)
    spread = longer_by.std()
    x = np.tanh(longer_by / spread) if spread > 0 else np.zeros_like(longer_by)
    x, won = np.append(x, [1.0, -1.0]), np.append(won, [0.5, 0.5])
    weight = np.append(1 / counts[place], [0.5, 0.5])
    place = np.append(place, [len(counts)] * 2)
    design = np.stack([np.ones_like(x), x], axis=1)
    coefficients = np.zeros(2)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-design @ coefficients))
        curvature = (design * (weight * chance * (1 - chance))[:, None]).T @ design
        step = np.linalg.solve(curvature, design.T @ (weight * (won - chance)))
        coefficients += step
        if np.abs(step).max() < 1e-10:
            break
    error = _clustered_errors(design, weight * (won - chance), curvature, place)[0]
    low, mean, high = (1 / (1 + np.exp(-(coefficients[0] + z * error))) for z in (-1.96, 0.0, 1.96))
    return {"mean": float(mean), "low": float(low), "high": float(high), "confidence": 0.95}


def _within_prompts(values: Floats, regressors: Floats, prompt: Ints) -> tuple[Floats, Floats]:
    """Least squares with a constant of its own for each prompt: coefficients and clustered standard errors, (R,) each."""
    design = np.stack([_centred(column, prompt) for column in regressors.T], axis=1)
    scale = np.sqrt((design**2).mean(axis=0))
    design = design / np.where(scale > 0, scale, 1.0)
    centred = _centred(values, prompt)
    curvature = design.T @ design
    coefficients = np.linalg.pinv(curvature) @ (design.T @ centred)
    place = np.unique(prompt, return_inverse=True)[1]
    errors = _clustered_errors(design, centred - design @ coefficients, curvature, place)
    unscale = np.where(scale > 0, scale, np.inf)
    return coefficients / unscale, errors / unscale


def _clustered_errors(design: Floats, residual: Floats, curvature: Floats, place: Ints) -> Floats:
    scores = np.stack([np.bincount(place, weights=column * residual) for column in design.T], axis=1)
    clusters = len(scores)
    if clusters < 2:
        return np.full(design.shape[1], np.nan)
    bread = np.linalg.pinv(curvature)
    variance = bread @ (scores.T @ scores) @ bread * clusters / (clusters - 1)
    errors: Floats = np.sqrt(np.diag(variance))
    return errors


def _centred(values: Floats, prompt: Ints) -> Floats:
    place = np.unique(prompt, return_inverse=True)[1]
    means = np.bincount(place, weights=values) / np.bincount(place)
    centred: Floats = values - means[place]
    return centred
