import itertools
import json

import numpy as np
import pyarrow as pa
import pytest

from qrpo.errors import DataError
from qrpo.evaluation.statistics import bootstrap_interval, kl_estimates, mean_by_prompt, win_rates
from qrpo.evaluation.summary import prompt_scores, summarise
from qrpo.training.settings import PolicyConfig


def evaluation_table(prompts=200, samples=4, shift=0.0, seed=0):
    """Rewards N(0, 1) for the reference and N(shift, 1) for the policy; log pi - log ref is that of the two normals."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt, (model, mean) in itertools.product(range(prompts), [("policy", shift), ("reference", 0.0)]):
        for index, reward in enumerate(rng.normal(mean, 1, samples)):
            rows.append(
                {
                    "prompt_id": f"p{prompt}",
                    "model": model,
                    "sample_index": index,
                    "reward": reward,
                    "quantile_reward": float(np.clip(reward / 6 + 0.5, 0, 1)),
                    "token_ids": [1] * (3 if model == "policy" else 5),
                    "model_logprob": -((reward - mean) ** 2) / 2,
                    "ref_logprob": -(reward**2) / 2,
                    "finish_reason": "stop" if index else "length",
                }
            )
    return pa.Table.from_pylist(rows)


def test_equal_models_win_half_and_have_no_divergence():
    summary = summarise(evaluation_table())

    assert summary["win_rate"]["low"] < 0.5 < summary["win_rate"]["high"]
    assert summary["kl"]["mean"] == summary["kl"]["k3"] == 0
    assert summary["prompts"] == 200
    assert summary["policy"]["samples"] == 800
    assert summary["policy"]["finish_reasons"] == {"length": 200, "stop": 600}
    assert summary["policy"]["length"]["mean"] == 3


def test_a_shifted_model_has_the_win_rate_and_divergence_of_two_normals():
    summary = summarise(evaluation_table(prompts=3000, shift=1.0))

    # P(N(1, 1) > N(0, 1)) = Phi(1/sqrt 2); KL of unit normals one apart = 1/2
    assert summary["win_rate"]["mean"] == pytest.approx(0.7602, abs=0.01)
    assert summary["win_rate"]["low"] < 0.7602 < summary["win_rate"]["high"]
    assert summary["kl"]["mean"] == pytest.approx(0.5, abs=4 * summary["kl"]["standard_error"])
    assert summary["kl"]["k3"] == pytest.approx(0.5, abs=0.05)


def test_ties_count_half_and_only_shared_prompts_count():
    rates = win_rates(
        np.array([1.0, 2.0, 9.0]), np.array([0, 0, 5]), np.array([1.0, 0.0, 3.0]), np.array([0, 0, 7])
    )

    # prompt 0: 1 against 1 and 0, 2 against 1 and 0
    np.testing.assert_allclose(rates, [(0.5 + 1 + 1 + 1) / 4])


def test_standard_errors_are_over_prompts_not_samples():
    prompt = np.repeat(np.arange(50), 100)
    values = np.random.default_rng(0).normal(size=50)[prompt]  # all samples of a prompt alike

    result = mean_by_prompt(values, prompt)

    assert result["standard_error"] == pytest.approx(values[::100].std(ddof=1) / np.sqrt(50))


def test_the_bootstrap_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [
        low <= 0.3 <= high
        for low, high in (
            bootstrap_interval(rng.binomial(1, 0.3, 100).astype(float), seed=s) for s in range(200)
        )
    ]

    assert 0.89 <= np.mean(covered) <= 0.99


def test_k3_is_never_negative_where_the_plain_estimate_is():
    estimates = kl_estimates(np.array([-0.5, -0.1, 0.2]), np.array([0, 1, 2]))

    assert estimates["mean"] < 0 < estimates["k3"]


def test_the_optimums_promise_stands_beside_the_measurement_as_json():
    summary = summarise(evaluation_table(20), PolicyConfig(beta=0.1), num_ref=16)

    # identity: the quantile's density is exp(t/beta)/Z, its mean 1/(1 - exp(-1/beta)) - beta
    assert summary["theory"]["quantile_reward"] == pytest.approx(1 / (1 - np.exp(-10)) - 0.1)
    assert summary["theory"]["attained_quantile_reward"] < summary["theory"]["quantile_reward"]
    assert json.loads(json.dumps(summary)) == summary


def test_unscored_rows_are_left_out_and_a_table_of_one_model_is_refused():
    rows = evaluation_table(5).to_pylist()
    for row in rows[::2]:
        row["reward"] = None

    assert summarise(pa.Table.from_pylist(rows))["policy"]["samples"] == 10
    with pytest.raises(DataError, match="20 scored samples of the policy and 0 of the reference"):
        summarise(
            pa.Table.from_pylist([row for row in evaluation_table(5).to_pylist() if row["model"] == "policy"])
        )


def test_other_models_are_compared_too_and_the_best_is_chosen_on_one_half():
    rows = evaluation_table(60, shift=0.2).to_pylist()
    rows += [
        row | {"model": "step-100"}
        for row in evaluation_table(60, shift=1.0, seed=1).to_pylist()
        if row["model"] == "policy"
    ]
    summary = summarise(pa.Table.from_pylist(rows))

    better = summary["others"]["step-100"]
    assert better["win_rate"]["low"] > summary["win_rate"]["high"]
    assert better["kl"]["mean"] == pytest.approx(0.5, abs=4 * better["kl"]["standard_error"])
    assert summary["best"]["best"] == "step-100"
    assert summary["best"]["selection_prompts"] == summary["best"]["report_prompts"] == 30
    assert summary["best"]["reported"]["low"] < 1.0 < summary["best"]["reported"]["high"]
    assert set(summary["best"]["selected_by"]) == {"policy", "step-100"}


def test_scores_by_prompt_are_those_that_the_summary_averages():
    table = evaluation_table(30, shift=0.5)
    summary = summarise(table)

    for score, expected in (("win_rate", summary["win_rate"]), ("kl", summary["kl"])):
        prompt_ids, scores = prompt_scores(table, score)
        assert len(prompt_ids) == 30
        assert list(scores) == ["policy"]
        assert scores["policy"].mean() == pytest.approx(expected["mean"])
    for score in ("reward", "quantile_reward", "length"):
        scores = prompt_scores(table, score)[1]
        assert {name: values.mean() for name, values in scores.items()} == pytest.approx(
            {name: summary[name][score]["mean"] for name in ("policy", "reference")}
        )


def test_every_draw_is_a_mean_over_prompts_of_its_own():
    summary = summarise(evaluation_table(50, samples=3))

    draws = summary["reference"]["reward_by_draw"]
    assert len(set(draws)) == 3
    assert np.mean(draws) == pytest.approx(summary["reference"]["reward"]["mean"])
