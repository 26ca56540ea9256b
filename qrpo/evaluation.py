"""Policy against reference on held-out prompts: what a table of fresh, scored samples says, and how surely.

Prompts are the units of chance: samples of one prompt resemble each other, so every standard error and interval is taken
over prompts, never over samples. All functions are pure, on NumPy arrays; `summarise` puts them together.

    win rate   P(policy's reward > reference's), ties a half, over all pairs of samples of the same prompt
    KL         E_policy[log pi - log ref], from the policy's own samples: unbiased; may be negative by chance
    k3         E_policy[ref/pi - 1 + log pi - log ref]: never negative, same expectation (Schulman 2020)
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qrpo.errors import DataError

if TYPE_CHECKING:
    from qrpo.optimization import PolicyConfig

__all__ = ["bootstrap_interval", "kl_estimates", "mean_by_prompt", "summarise", "win_rates"]

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000


def summarise(
    table: Any, config: "PolicyConfig | None" = None, *, num_ref: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare the models of an evaluation table; plain numbers, for JSON.

    `table`: a `pyarrow.Table` or a mapping of columns, one row per sample: `prompt_id`, `model` (policy or reference),
    `reward`, `quantile_reward`, `policy_logprob`, `ref_logprob`, `finish_reason`, and `length` or `token_ids`. Rows whose
    reward is null are left out. With `config` the answer has `theory`: what the optimum of its transform and beta
    promises, and with `num_ref` what quantiles of so many references can attain of it.
    """
    columns: Mapping[str, Sequence[Any]] = table.to_pydict() if hasattr(table, "to_pydict") else table
    scored = [row for row, reward in enumerate(columns["reward"]) if reward is not None]
    prompt_ids = [columns["prompt_id"][row] for row in scored]
    model = np.array([columns["model"][row] for row in scored])
    is_policy, is_reference = model == "policy", model == "reference"
    if not is_policy.any() or not is_reference.any():
        raise DataError(
            f"evaluation: {int(is_policy.sum())} scored samples of the policy and {int(is_reference.sum())} of the "
            "reference, expected some of both; look at the stage's rejects"
        )
    prompt = np.unique(np.array(prompt_ids), return_inverse=True)[1]

    def numbers(name: str) -> Floats:
        return np.array(
            [np.nan if columns[name][row] is None else columns[name][row] for row in scored], float
        )

    reward, quantile_reward = numbers("reward"), numbers("quantile_reward")
    length = (
        numbers("length")
        if "length" in columns
        else np.array([len(columns["token_ids"][row]) for row in scored], float)
    )
    log_ratio = numbers("policy_logprob") - numbers("ref_logprob")

    def of(which: npt.NDArray[np.bool_]) -> dict[str, Any]:
        reasons = Counter(
            str(columns["finish_reason"][row]) for row, mine in zip(scored, which, strict=True) if mine
        )
        return {
            "samples": int(which.sum()),
            "reward": mean_by_prompt(reward[which], prompt[which]),
            "quantile_reward": mean_by_prompt(quantile_reward[which], prompt[which]),
            "length": mean_by_prompt(length[which], prompt[which]),
            "finish_reasons": dict(sorted(reasons.items())),
        }

    wins = win_rates(reward[is_policy], prompt[is_policy], reward[is_reference], prompt[is_reference])
    low, high = bootstrap_interval(wins, seed=seed)
    result: dict[str, Any] = {
        "prompts": len(set(prompt_ids)),
        "policy": of(is_policy),
        "reference": of(is_reference),
        "win_rate": {"mean": float(wins.mean()), "low": low, "high": high, "confidence": 0.95},
        "kl": kl_estimates(log_ratio[is_policy], prompt[is_policy]),
    }
    if config is not None:
        result["theory"] = _promised(config, num_ref)
    return result


def mean_by_prompt(values: Floats, prompt: npt.NDArray[np.int64]) -> dict[str, float]:
    """Mean over prompts of each prompt's mean, and its standard error; NaN values are left out.

    `values` and `prompt` (any integers that tell prompts apart) have one entry per sample.
    """
    means = _prompt_means(values, prompt)
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    return {"mean": float(means.mean()) if len(means) else float("nan"), "standard_error": error}


def win_rates(
    reward: Floats, prompt: npt.NDArray[np.int64], ref_reward: Floats, ref_prompt: npt.NDArray[np.int64]
) -> Floats:
    """One win rate for each prompt that both have samples of: the share of pairs won, ties counting a half."""
    order = np.argsort(ref_prompt, kind="stable")
    ref_reward, ref_prompt = ref_reward[order], ref_prompt[order]
    rates = []
    for one in np.intersect1d(prompt, ref_prompt):
        begin, end = np.searchsorted(ref_prompt, [one, one + 1])
        mine, theirs = reward[prompt == one][:, None], ref_reward[None, begin:end]
        rates.append(float(np.mean((mine > theirs) + 0.5 * (mine == theirs))))
    return np.array(rates)


def kl_estimates(log_ratio: Floats, prompt: npt.NDArray[np.int64]) -> dict[str, float]:
    """KL(policy || reference) in nats per completion, from log pi - log ref (S,) of S samples of the policy."""
    plain = mean_by_prompt(log_ratio, prompt)
    return {**plain, "k3": mean_by_prompt(np.expm1(-log_ratio) + log_ratio, prompt)["mean"]}


def bootstrap_interval(values: Floats, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean of `values`, one per prompt, by drawing prompts with replacement."""
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[rng.integers(0, len(values), (rows, len(values)))].mean(axis=1)
            for rows in np.full(RESAMPLES // 100, 100)  # a hundred at a time: many prompts fit into memory
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _prompt_means(values: Floats, prompt: npt.NDArray[np.int64]) -> Floats:
    known = ~np.isnan(values)
    _, place = np.unique(prompt[known], return_inverse=True)
    counts = np.bincount(place)
    return np.bincount(place, weights=values[known]) / counts


def _promised(config: "PolicyConfig", num_ref: int | None) -> dict[str, Any]:
    from qrpo.theory import summary

    promised = summary(config.transform, config.beta, num_ref)
    names = {
        "win_rate": "quantile_reward",
        "kl": "kl",
        "attained_win_rate": "attained_quantile_reward",
        "attained_kl": "attained_kl",
    }
    return {"beta": config.beta, "transform": config.transform} | {
        name: promised[key] for key, name in names.items() if key in promised
    }
