"""Compare models with the reference on held-out prompts, from a table of scored samples.

`summarise` combines `statistics`, `length_control`, `diversity` and `comparison`, which take plain
arrays and can be used alone. `prompt_scores` gives scores per prompt, to compare runs.
"""

import math
from collections import Counter
from dataclasses import asdict
from typing import Any, Literal

import polars as pl

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
        got = {name: len(samples.get(name, ())) for name in ("policy", "reference")}
        raise DataError(
            f"evaluation: {got['policy']} scored samples of the policy and {got['reference']} of the "
            "reference, expected some of both; check the stage's rejects"
        )
    reference = samples["reference"]
    result: dict[str, Any] = {
        "prompts": len(set().union(*(own["prompt_id"] for own in samples.values()))),
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
    shared = sorted(set.intersection(*(set(own["prompt_id"]) for own in samples.values())))
    samples = {name: own.filter(pl.col("prompt_id").is_in(shared)) for name, own in samples.items()}
    scores = {}
    for name, own in samples.items():
        if score in ("win_rate", "kl") and name == "reference":
            continue
        column = "log_ratio" if score == "kl" else score
        scores[name] = (
            _wins(own, samples["reference"])
            if score == "win_rate"
            else prompt_means(_column(own, column), _prompts(own))
        )
    return shared, scores


def _samples(table: Any) -> dict[str, pl.DataFrame]:
    """The scored rows of each model, in the order in which the models first appear; `prompt`
    numbers the prompts in the order of their ids."""
    rows = pl.DataFrame({name: table[name] for name in COLUMNS}).filter(pl.col("reward").is_not_null())
    rows = rows.with_columns(
        prompt=pl.col("prompt_id").rank("dense").cast(pl.Int64) - 1,
        length=pl.col("token_ids").list.len().cast(pl.Float64),
        log_ratio=pl.col("model_logprob").cast(pl.Float64) - pl.col("ref_logprob").cast(pl.Float64),
    )
    return {str(model): own for (model,), own in rows.group_by("model", maintain_order=True)}


def _column(own: pl.DataFrame, name: str) -> Floats:
    """A column (S,) of numbers, NaN where it is null."""
    return own[name].cast(pl.Float64).to_numpy()


def _prompts(own: pl.DataFrame) -> Ints:
    return own["prompt"].to_numpy()


def _by_prompt(own: pl.DataFrame, name: str) -> dict[str, float]:
    return mean_by_prompt(_column(own, name), _prompts(own))


def _wins(own: pl.DataFrame, reference: pl.DataFrame) -> Floats:
    return win_rates(_column(own, "reward"), _prompts(own), _column(reference, "reward"), _prompts(reference))


def _describe(own: pl.DataFrame) -> dict[str, Any]:
    """One model. `reward_by_draw`: mean reward of all first samples, of all second, ..."""
    return {
        "samples": len(own),
        "reward": _by_prompt(own, "reward"),
        "quantile_reward": _by_prompt(own, "quantile_reward"),
        "length": _by_prompt(own, "length"),
        "reward_by_draw": prompt_means(_column(own, "reward"), own["sample_index"].to_numpy()).tolist(),
        "diversity": diversity(own["token_ids"].to_list(), _prompts(own)),
        "finish_reasons": dict(sorted(Counter(map(str, own["finish_reason"])).items())),
    }


def _compare(own: pl.DataFrame, reference: pl.DataFrame, seed: int) -> dict[str, Any]:
    """One model against the reference."""
    wins = _wins(own, reference)
    if not len(wins):
        raise DataError(
            "evaluation: no prompt has scored samples of both a model and the reference; check the rejects"
        )
    low, high = bootstrap_interval(wins, seed=seed)
    arrays: list[Any] = [
        array
        for rows in (own, reference)
        for array in (_column(rows, "reward"), _column(rows, "length"), _prompts(rows))
    ]
    return {
        "win_rate": {"mean": float(wins.mean()), "low": low, "high": high, "confidence": 0.95},
        "kl": kl_estimates(_column(own, "log_ratio"), _prompts(own)),
        "length_controlled": compare_at_equal_length(*arrays),
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
