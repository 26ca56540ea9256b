"""Compare models with the reference on held-out prompts, from a table of scored samples.

`summarise` combines `statistics`, `length_control`, `diversity` and `comparison`, which take plain
arrays and can be used alone. `prompt_scores` gives scores per prompt, to compare runs.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from qrpo.errors import DataError
from qrpo.evaluation.comparison import choose_best
from qrpo.evaluation.diversity import diversity
from qrpo.evaluation.length_control import compare_at_equal_length
from qrpo.evaluation.statistics import (
    Floats,
    Ints,
    bootstrap_interval,
    kl_estimates,
    mean_by_prompt,
    prompt_means,
    win_rates,
)
from qrpo.method.theory import summary as theory_summary
from qrpo.training.settings import PolicyConfig

__all__ = ["COLUMNS", "json_numbers", "prompt_scores", "summarise"]

COLUMNS = (
    "prompt_id",
    "model",
    "sample_index",
    "reward",
    "quantile_reward",
    "model_logprob",
    "ref_logprob",
    "finish_reason",
    "token_ids",
)
"""The columns of an evaluation table that `summarise` reads."""
Score = Literal["reward", "quantile_reward", "length", "win_rate", "kl"]


def summarise(
    table: Any, config: PolicyConfig | None = None, *, num_ref: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare the models of an evaluation table with the reference; plain numbers, for JSON (null
    for unknown values).

    `table`: a `pyarrow.Table` or a mapping of columns, one row per sample: `prompt_id`, `model`
    (reference, policy, and any others), `sample_index`, `reward`, `quantile_reward`,
    `model_logprob` (under the model that drew it), `ref_logprob`, `finish_reason`, `token_ids`.
    Rows whose reward is null are excluded.

    The result describes `policy` and `reference` and compares the two: `win_rate`, `kl`,
    `length_controlled`. If the table has other models, `others` holds the same of each, and `best`
    the model with the highest reward, chosen on one half of the prompts and reported on the other.
    With a QRPO `config`, `theory` holds the values at the optimum for its transform and beta, and
    with `num_ref` the values attainable from quantiles of this many references.
    """
    samples = _samples(table)
    if not {"policy", "reference"} <= samples.keys():
        got = {name: len(samples[name].reward) if name in samples else 0 for name in ("policy", "reference")}
        raise DataError(
            f"evaluation: {got['policy']} scored samples of the policy and {got['reference']} of the "
            "reference, expected some of both; check the stage's rejects"
        )
    reference = samples["reference"]
    result: dict[str, Any] = {
        "prompts": len(np.unique(np.concatenate([own.prompt for own in samples.values()]))),
        "policy": _describe(samples["policy"]),
        "reference": _describe(reference),
        **_compare(samples["policy"], reference, seed),
    }
    others = [name for name in samples if name not in ("policy", "reference")]
    if others:
        compared = {
            name: _describe(samples[name]) | _compare(samples[name], reference, seed) for name in others
        }
        result["others"] = compared
        prompt_ids, rewards = prompt_scores(table, "reward")
        candidates = {name: rewards[name] for name in ("policy", *others)}
        if len(prompt_ids) > 1:
            result["best"] = asdict(choose_best(candidates, prompt_ids, seed=seed))
    if config is not None and config.loss == "qrpo":
        result["theory"] = _promised(config, num_ref)
    plain: dict[str, Any] = json_numbers(result)
    return plain


def prompt_scores(table: Any, score: Score) -> tuple[list[str], dict[str, Floats]]:
    """Prompt ids (P,) and each model's mean score of each (P,), of the prompts that every model has
    samples of.

    `win_rate` and `kl` are against the reference, which then has no entry. Input of `choose_best`
    and `seeds_and_prompts`.
    """
    samples = _samples(table)
    shared = sorted(set.intersection(*(set(own.prompt_ids) for own in samples.values())))
    scores = {}
    for name, own in samples.items():
        own = own.only(shared)
        if score == "win_rate" and name != "reference":
            reference = samples["reference"].only(shared)
            scores[name] = win_rates(own.reward, own.prompt, reference.reward, reference.prompt)
        elif score == "kl" and name != "reference":
            scores[name] = prompt_means(own.log_ratio, own.prompt)
        elif score not in ("win_rate", "kl"):
            scores[name] = prompt_means(getattr(own, score), own.prompt)
    return shared, scores


@dataclass(frozen=True)
class _Samples:
    """One model's S scored samples; `prompt` (S,) numbers the prompts in the order of their ids."""

    prompt_ids: list[str]
    prompt: Ints
    draw: Ints
    reward: Floats
    quantile_reward: Floats
    length: Floats
    log_ratio: Floats
    finish_reasons: list[str]
    tokens: list[Sequence[int]]

    def only(self, prompt_ids: Sequence[str]) -> "_Samples":
        wanted = set(prompt_ids)
        rows = np.array([row for row, one in enumerate(self.prompt_ids) if one in wanted], dtype=np.int64)
        kept: dict[str, Any] = {
            name: value[rows] if isinstance(value, np.ndarray) else [value[row] for row in rows]
            for name, value in vars(self).items()
        }
        return _Samples(**kept)


def _samples(table: Any) -> dict[str, _Samples]:
    """The scored rows of each model, in the order in which the models first appear."""
    columns: Mapping[str, Sequence[Any]] = (
        table.select(COLUMNS).to_pydict() if hasattr(table, "to_pydict") else table
    )
    number = {name: index for index, name in enumerate(sorted(set(columns["prompt_id"])))}
    rows_of: dict[str, list[int]] = {}
    for row, (model, reward) in enumerate(zip(columns["model"], columns["reward"], strict=True)):
        if reward is not None:
            rows_of.setdefault(model, []).append(row)

    def numbers(name: str, rows: Sequence[int]) -> Floats:
        column = columns[name]
        return np.array([np.nan if column[row] is None else column[row] for row in rows], dtype=float)

    samples = {}
    for model, rows in rows_of.items():
        prompt_ids = [columns["prompt_id"][row] for row in rows]
        tokens = [columns["token_ids"][row] for row in rows]
        samples[model] = _Samples(
            prompt_ids=prompt_ids,
            prompt=np.array([number[name] for name in prompt_ids], dtype=np.int64),
            draw=np.array([columns["sample_index"][row] for row in rows], dtype=np.int64),
            reward=numbers("reward", rows),
            quantile_reward=numbers("quantile_reward", rows),
            length=np.array([len(some) for some in tokens], dtype=float),
            log_ratio=numbers("model_logprob", rows) - numbers("ref_logprob", rows),
            finish_reasons=[str(columns["finish_reason"][row]) for row in rows],
            tokens=tokens,
        )
    return samples


def _describe(own: _Samples) -> dict[str, Any]:
    """One model. `reward_by_draw`: mean reward of all first samples, of all second, ..."""
    return {
        "samples": len(own.reward),
        "reward": mean_by_prompt(own.reward, own.prompt),
        "quantile_reward": mean_by_prompt(own.quantile_reward, own.prompt),
        "length": mean_by_prompt(own.length, own.prompt),
        "reward_by_draw": prompt_means(own.reward, own.draw).tolist(),
        "diversity": diversity(own.tokens, own.prompt),
        "finish_reasons": dict(sorted(Counter(own.finish_reasons).items())),
    }


def _compare(own: _Samples, reference: _Samples, seed: int) -> dict[str, Any]:
    """One model against the reference."""
    wins = win_rates(own.reward, own.prompt, reference.reward, reference.prompt)
    if not len(wins):
        raise DataError(
            "evaluation: no prompt has scored samples of both a model and the reference; check the rejects"
        )
    low, high = bootstrap_interval(wins, seed=seed)
    return {
        "win_rate": {"mean": float(wins.mean()), "low": low, "high": high, "confidence": 0.95},
        "kl": kl_estimates(own.log_ratio, own.prompt),
        "length_controlled": compare_at_equal_length(
            own.reward, own.length, own.prompt, reference.reward, reference.length, reference.prompt
        ),
    }


def json_numbers(value: Any) -> Any:
    """Replace numbers that JSON lacks (NaN, infinity) by None."""
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _promised(config: PolicyConfig, num_ref: int | None) -> dict[str, Any]:
    promised = theory_summary(config.transform, config.beta, num_ref)
    names = {
        "win_rate": "quantile_reward",
        "kl": "kl",
        "attained_win_rate": "attained_quantile_reward",
        "attained_kl": "attained_kl",
    }
    return {"beta": config.beta, "transform": config.transform} | {
        name: promised[key] for key, name in names.items() if key in promised
    }
