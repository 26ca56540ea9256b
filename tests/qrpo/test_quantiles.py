"""Quantile rewards against the definition, one prompt at a time, and against what they promise statistically."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qrpo.errors import ConfigError, DataError
from qrpo.method.quantiles import quantile_bounds, quantile_rewards, standard_error
from tests.support.refusals import refuses

TIES = ("weak", "strict", "mid")


def by_definition(rewards, references, ties):
    """One prompt, straight from the definition."""
    below = [sum(s < r for s in references) for r in rewards]
    at_most = [sum(s <= r for s in references) for r in rewards]
    counts = {"weak": at_most, "strict": below, "mid": np.add(at_most, below) / 2}[ties]
    return [count / len(references) for count in counts]


def of_prompts(prompts, ties):
    """Quantiles of (references, rewards) of each prompt, flat, and those of the definition."""
    flat = [np.array([x for pair in prompts for x in pair[side]], dtype=np.float32) for side in (1, 0)]
    bounds = [np.cumsum([0, *(len(pair[side]) for pair in prompts)]) for side in (1, 0)]
    found = quantile_rewards(*flat, offsets=bounds[0], ref_offsets=bounds[1], ties=ties)
    return found, np.float32([q for refs, mine in prompts for q in by_definition(mine, refs, ties)])


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("grades", [None, 4])
def test_ragged_prompts_equal_the_definition(ties, grades):
    rng = np.random.default_rng(0)

    def draw(count):
        return (rng.integers(0, grades, count) if grades else rng.normal(size=count)).astype(np.float32)

    prompts = [(draw(rng.integers(1, 60)), draw(rng.integers(0, 7))) for _ in range(300)]
    found, expected = of_prompts(prompts, ties)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


any_float = st.floats(width=32, allow_nan=False)
any_prompt = st.tuples(st.lists(any_float, min_size=1, max_size=9), st.lists(any_float, max_size=5))


@settings(max_examples=60)
@given(st.lists(any_prompt, min_size=1, max_size=8), st.sampled_from(TIES))
def test_any_finite_or_infinite_rewards_equal_the_definition(prompts, ties):
    np.testing.assert_array_equal(*of_prompts(prompts, ties))


def test_dense_equals_ragged_and_scipy():
    rng = np.random.default_rng(1)
    references, rewards = (rng.normal(size=(300, n)).astype(np.float32) for n in (50, 3))
    dense = quantile_rewards(rewards, references)
    bounds = {"offsets": np.arange(0, 901, 3), "ref_offsets": np.arange(0, 15001, 50)}
    flat = quantile_rewards(rewards.ravel(), references.ravel(), **bounds)
    np.testing.assert_array_equal(dense, flat.reshape(300, 3))
    for p in range(0, 300, 50):
        percentile = stats.percentileofscore(references[p], rewards[p, 1], "weak")
        assert dense[p, 1] == pytest.approx(percentile / 100)


def test_arrow_list_columns_are_used_as_they_lie():
    column = pa.array([[0.0, 1.0, 2.0], [5.0], [1.0, 3.0]], pa.list_(pa.float32())).slice(1)
    rewards = pa.array([[9.9], [5.0, 4.0], [2.0]], pa.list_(pa.float32())).slice(1)
    bounds = {"offsets": rewards.offsets, "ref_offsets": column.offsets}
    q = quantile_rewards(rewards.values.to_numpy(), column.values.to_numpy(), **bounds)
    np.testing.assert_array_equal(q, np.float32([1.0, 0.0, 0.5]))


def test_a_completion_is_left_out_of_its_own_references():
    references, rewards = np.float32([[1, 2, 3, 4]]), np.float32([[3, 3, 0.5]])
    mine = np.array([[True, False, False]])
    np.testing.assert_allclose(quantile_rewards(rewards, references, in_reference=mine), [[2 / 3, 3 / 4, 0]])
    inclusive = quantile_rewards(rewards, references, in_reference=mine, self_exclusion=False)
    np.testing.assert_allclose(inclusive, [[3 / 4, 3 / 4, 0]])


def test_leaving_one_out_of_many_equals_recounting_without_it():
    rng = np.random.default_rng(3)
    references = rng.integers(0, 6, (40, 12)).astype(np.float32)
    for ties in TIES:
        q = quantile_rewards(references, references, in_reference=np.ones((40, 12), bool), ties=ties)
        for p, i in [(0, 0), (7, 3), (39, 11)]:
            others = np.delete(references[p], i).tolist()
            assert q[p, i] == pytest.approx(by_definition([references[p, i]], others, ties)[0], abs=1e-7)


@pytest.mark.parametrize("probabilities", [[1.0], [0.7, 0.3], [0.05, 0.9, 0.05]])
@pytest.mark.parametrize("loo", [False, True])
def test_randomized_ties_are_uniform_for_discrete_rewards(probabilities, loo):
    # under the reference, reward and references are draws of one distribution, here with heavy ties
    rng = np.random.default_rng(4)
    draws = rng.choice(len(probabilities), (40_000, 6), p=probabilities).astype(np.float32)
    references, rewards = draws[:, :5], draws[:, :1] if loo else draws[:, 5:]
    options = {"ties": "randomized", "in_reference": np.ones((40_000, 1), bool) if loo else None}
    q, again, other = (quantile_rewards(rewards, references, seed=seed, **options) for seed in (5, 5, 6))
    assert stats.kstest(q.ravel(), "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(q, again)
    assert not np.array_equal(q, other)


def test_weak_quantiles_without_ties_are_uniform_on_their_grid():
    rng = np.random.default_rng(6)
    q = quantile_rewards(rng.normal(size=(50_000, 1)), rng.normal(size=(50_000, 4)))
    assert stats.chisquare(np.bincount((q.ravel() * 4).round().astype(int), minlength=5)).pvalue > 1e-3


def test_what_does_not_fit_is_refused_and_a_prompt_named():
    ones, nan = np.float32([[1, 2, 3]]), np.zeros((3, 4), np.float32)
    nan[2, 1] = np.nan
    mark = {"in_reference": np.array([[True]])}
    for message, rewards, references, options in (
        ("no reference reward of its prompt equals it", [[2.5]], ones, mark),
        ("expected a mask of the 1 rewards", [[2.5]], ones, {"in_reference": np.array([[1]])}),
        ("too few for the quantile of its completion 0, itself one of them", [[1]], [[1]], mark),
        ("ref_rewards: prompt 2 has a NaN", np.zeros((3, 2)), nan, {}),
        ("prompt 1 has 0 reference rewards", np.zeros((2, 1)), np.zeros(3), {"ref_offsets": [0, 3, 3]}),
        ("each prompt needs one row in both", np.zeros((2, 1)), np.zeros((3, 4)), {}),
        (r"expected \(prompts, completions\)", np.zeros(2), np.zeros((2, 4)), {}),
        ("offsets must ascend", np.zeros((1, 1)), np.zeros(3), {"ref_offsets": [0, 5]}),
    ):
        refuses(DataError, message, quantile_rewards, rewards, references, **options)
    refuses(ConfigError, "ties", quantile_rewards, np.zeros((1, 1)), np.zeros((1, 1)), ties="average")
    # a prompt without references does no harm where nothing is asked of it, at the end neither
    q = quantile_rewards([1.0], [0.0, 2.0], offsets=[0, 0, 1, 1], ref_offsets=[0, 0, 2, 2])
    assert q.tolist() == [0.5]


def test_bounds_are_the_binomial_interval():
    for n in (1, 3, 10, 50):
        low, high = quantile_bounds(np.arange(n + 1, dtype=np.float32)[None] / n, [n], confidence=0.9)
        for k in range(n + 1):
            exact = stats.binomtest(k, n).proportion_ci(0.9, method="exact")
            assert (low[0, k], high[0, k]) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_bounds_cover_the_true_quantile_as_often_as_they_say():
    k = np.arange(21)
    low, high = quantile_bounds(k / 20, np.full(21, 20))
    for truth in (0.02, 0.3, 0.5, 0.97):
        assert stats.binom.pmf(k, 20, truth)[(low <= truth) & (truth <= high)].sum() >= 0.95


def test_standard_error_is_that_of_the_estimate():
    estimates = quantile_rewards(np.full((40_000, 1), 0.3), np.random.default_rng(7).random((40_000, 25)))
    assert estimates.std() == pytest.approx(float(standard_error(0.3, 25)), rel=0.02)
    assert float(standard_error(0.0, 10)) == 0.0


def test_importing_quantiles_imports_neither_torch_nor_scipy():
    probe = "import sys, qrpo.method.quantiles; assert not {'torch', 'scipy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_ragged_references_are_not_padded_to_the_longest():
    rng = np.random.default_rng(8)
    counts = np.array([500_000, *[2] * 50_000])
    references, rewards = (rng.normal(size=n).astype(np.float32) for n in (counts.sum(), len(counts)))
    bounds = {"offsets": np.arange(len(counts) + 1), "ref_offsets": np.concatenate([[0], np.cumsum(counts)])}
    tracemalloc.start()
    quantiles = quantile_rewards(rewards, references, **bounds)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20  # padded, a byte for each comparison alone would be 25 GB
    assert quantiles[0] == np.float32(np.mean(references[:500_000] <= rewards[0]))
