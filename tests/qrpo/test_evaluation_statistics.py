"""Length control, diversity and selection, each against another derivation."""

import numpy as np
import pytest

from qrpo.errors import DataError
from qrpo.evaluation.comparison import choose_best, selection_half
from qrpo.evaluation.diversity import diversity
from qrpo.evaluation.length_control import compare_at_equal_length, reward_per_token
from qrpo.evaluation.statistics import sample_pairs, seeds_and_prompts, win_rates


def samples(prompts, per_prompt, longer_by, better_by, per_token, seed):
    """Rewards that a prompt, a token and the model each add to; lengths around 50, the policy's `longer_by` more."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), per_prompt)
    level = rng.normal(0, 2, prompts)[prompt]
    made = []
    for shift, gain in ((longer_by, better_by), (0.0, 0.0)):
        length = np.round(rng.normal(50 + shift, 10, len(prompt)))
        made += [level + gain + per_token * length + rng.normal(0, 0.5, len(prompt)), length, prompt]
    return made


def test_a_model_that_is_only_longer_wins_nothing_at_equal_length():
    compared = compare_at_equal_length(*samples(400, 4, longer_by=15, better_by=0.0, per_token=0.1, seed=0))

    assert compared["reward_gain_unadjusted"]["mean"] == pytest.approx(1.5, abs=0.1)
    assert compared["reward_gain"]["mean"] == pytest.approx(
        0, abs=4 * compared["reward_gain"]["standard_error"]
    )
    assert compared["win_rate"]["mean"] == pytest.approx(0.5, abs=0.06)
    for model in ("model", "reference"):
        slope = compared["reward_per_token"][model]
        assert slope["mean"] == pytest.approx(0.1, abs=4 * slope["standard_error"])
        assert slope["correlation"] > 0.85


def test_a_model_that_is_better_at_every_length_keeps_its_gain():
    compared = compare_at_equal_length(*samples(400, 4, longer_by=-15, better_by=1.0, per_token=0.1, seed=1))

    assert compared["reward_gain_unadjusted"]["mean"] < 0
    assert compared["reward_gain"]["mean"] == pytest.approx(
        1, abs=4 * compared["reward_gain"]["standard_error"]
    )
    assert compared["win_rate"]["low"] > 0.6


def test_the_fixed_effects_regression_is_that_of_one_column_per_prompt():
    reward, length, prompt, ref_reward, ref_length, ref_prompt = samples(30, 3, 5, 0.7, 0.05, seed=2)
    place = np.concatenate([prompt, ref_prompt])
    design = np.column_stack(
        [
            np.repeat([1.0, 0.0], [len(prompt), len(ref_prompt)]),
            np.concatenate([length, ref_length]),
            np.eye(30)[place],
        ]
    )
    expected, *_ = np.linalg.lstsq(design, np.concatenate([reward, ref_reward]), rcond=None)

    compared = compare_at_equal_length(reward, length, prompt, ref_reward, ref_length, ref_prompt)

    assert compared["reward_gain"]["mean"] == pytest.approx(expected[0])


def test_the_equal_length_win_rate_is_the_maximum_of_its_likelihood():
    from scipy.optimize import minimize

    reward, length, prompt, ref_reward, ref_length, ref_prompt = samples(60, 2, 8, 0.3, 0.05, seed=3)
    mine, theirs = sample_pairs(prompt, ref_prompt)
    won = (reward[mine] > ref_reward[theirs]).astype(float)
    longer_by = length[mine] - ref_length[theirs]
    x, y, weight = np.tanh(longer_by / longer_by.std()), won, np.full(len(won), 1 / 4)

    def loss(ab):
        z = ab[0] + ab[1] * x
        return (weight * (np.logaddexp(0, z) - y * z)).sum()

    best = minimize(loss, np.zeros(2), tol=1e-12).x
    found = compare_at_equal_length(reward, length, prompt, ref_reward, ref_length, ref_prompt)

    assert found["win_rate"]["mean"] == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-5)


@pytest.mark.parametrize(("prompts", "per_token"), [(60, 0.1), (20, 0.1), (20, 0.02)])
def test_the_equal_length_win_rate_is_unbiased_and_its_interval_covers_as_often_as_it_says(
    prompts, per_token
):
    made = [
        samples(prompts, 4, longer_by=15, better_by=0.0, per_token=per_token, seed=seed)
        for seed in range(200)
    ]
    wins = [compare_at_equal_length(*one)["win_rate"] for one in made]

    means = np.array([win["mean"] for win in wins])
    assert means.mean() == pytest.approx(0.5, abs=3 * means.std() / np.sqrt(200))
    assert 0.91 <= np.mean([win["low"] <= 0.5 <= win["high"] for win in wins]) <= 0.99


def test_lengths_that_never_differ_and_a_model_that_always_wins_still_have_finite_answers():
    prompt = np.repeat(np.arange(20), 2)
    same = np.full(40, 7.0)
    compared = compare_at_equal_length(same, same, prompt, same - 1, same, prompt)

    assert 0.95 < compared["win_rate"]["mean"] < 1
    assert compared["reward_gain"]["mean"] == pytest.approx(1)
    assert reward_per_token(same, same, prompt).mean == 0
    assert np.isnan(reward_per_token(same, same, prompt).correlation)


def test_pairs_are_all_pairs_of_the_same_prompt_whatever_the_order():
    prompt, ref_prompt = np.array([5, 1, 5, 9]), np.array([1, 5, 7, 5, 1])

    mine, theirs = sample_pairs(prompt, ref_prompt)

    pairs = {(i, j) for i in range(4) for j in range(5) if prompt[i] == ref_prompt[j]}
    assert set(zip(mine.tolist(), theirs.tolist(), strict=True)) == pairs
    assert len(mine) == len(pairs)
    assert win_rates(np.ones(1), np.array([3]), np.ones(1), np.array([4])).shape == (0,)


def test_diversity_by_hand():
    # prompt 0: two of three alike; prompt 1: nothing shared
    texts = [["a", "b", "a"], ["a", "b", "a"], ["b", "a"], ["c", "d"], ["e", "f"]]
    measured = diversity(texts, np.array([0, 0, 0, 1, 1]))

    assert measured["unique"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert measured["distinct_1"]["mean"] == pytest.approx((2 / 8 + 1) / 2)
    assert measured["distinct_2"]["mean"] == pytest.approx((2 / 5 + 1) / 2)
    # {ab, ba} with {ab, ba}: 1; twice with {ba}: 1/2
    assert measured["self_similarity"]["mean"] == pytest.approx(((1 + 0.5 + 0.5) / 3 + 0) / 2)


def test_the_best_of_many_equal_models_is_not_flattered_by_its_own_choice():
    rng = np.random.default_rng(0)
    ids = [f"p{index}" for index in range(60)]
    chosen, reported = [], []
    for seed in range(60):
        choice = choose_best({f"m{k}": rng.normal(0, 1, 60) for k in range(20)}, ids, seed=seed)
        chosen.append(max(choice.selected_by.values()))
        reported.append(choice.reported["mean"])

    assert np.mean(chosen) > 0.25  # the winner's curse, on the half that chose
    assert abs(np.mean(reported)) < 4 * np.std(reported) / np.sqrt(60)


def test_halves_are_disjoint_equal_and_the_same_in_any_order():
    ids = [f"p{index}" for index in range(11)]
    half = selection_half(ids)

    assert half.sum() == 5
    assert dict(zip(ids, half, strict=True)) == dict(
        zip(reversed(ids), selection_half(ids[::-1]), strict=True)
    )
    assert (selection_half(ids, seed=1) != half).any()


def test_a_choice_needs_two_prompts_and_a_score_for_each():
    with pytest.raises(DataError, match="at least two prompts"):
        choose_best({"a": np.array([1.0])}, ["p"])
    with pytest.raises(DataError, match=r"\{'a': 1\} for 2 prompts"):
        choose_best({"a": np.array([1.0])}, ["p", "q"])


def test_seeds_that_disagree_widen_the_interval():
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 1, 200)
    agreeing = seeds_and_prompts(prompts + rng.normal(0, 0.01, (4, 200)))
    apart = seeds_and_prompts(prompts + np.array([-0.6, -0.2, 0.2, 0.6])[:, None])

    assert agreeing["standard_error"] < 0.01 < apart["standard_error"]
    assert apart["standard_error"] == pytest.approx(np.std([-0.6, -0.2, 0.2, 0.6], ddof=1) / 2)
    assert apart["high"] - apart["low"] > 1.5 * (agreeing["high"] - agreeing["low"])
