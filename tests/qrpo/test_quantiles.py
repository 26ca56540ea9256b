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


def by_definition(rewards: list[float], references: list[float], ties: str) -> list[float]:
    """One prompt, straight from the definition."""
    n = len(references)
    below = [sum(s < r for s in references) for r in rewards]
    at_most = [sum(s <= r for s in references) for r in rewards]
    if ties == "weak":
        return [a / n for a in at_most]
    if ties == "strict":
        return [b / n for b in below]
    return [(a + b) / (2 * n) for a, b in zip(at_most, below, strict=True)]


def ragged(rng: np.random.Generator, lengths: list[int], *, grades: int | None = None):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.integers(0, grades, offsets[-1]) if grades else rng.normal(size=offsets[-1])
    return values.astype(np.float32), offsets


@pytest.mark.parametrize("ties", ["weak", "strict", "mid"])
@pytest.mark.parametrize("grades", [None, 4])
def test_ragged_prompts_equal_the_definition(ties, grades):
    rng = np.random.default_rng(0)
    references, ref_offsets = ragged(rng, rng.integers(1, 60, 500).tolist(), grades=grades)
    rewards, offsets = ragged(rng, rng.integers(0, 7, 500).tolist(), grades=grades)
    q = quantile_rewards(rewards, references, offsets=offsets, ref_offsets=ref_offsets, ties=ties)
    assert q.dtype == np.float32
    for p in range(500):
        expected = by_definition(
            rewards[offsets[p] : offsets[p + 1]].tolist(),
            references[ref_offsets[p] : ref_offsets[p + 1]].tolist(),
            ties,
        )
        np.testing.assert_array_equal(q[offsets[p] : offsets[p + 1]], np.float32(expected))


def test_dense_equals_ragged_and_scipy():
    rng = np.random.default_rng(1)
    references = rng.normal(size=(300, 50)).astype(np.float32)
    rewards = rng.normal(size=(300, 3)).astype(np.float32)
    dense = quantile_rewards(rewards, references)
    flat = quantile_rewards(
        rewards.ravel(), references.ravel(), offsets=np.arange(0, 901, 3), ref_offsets=np.arange(0, 15001, 50)
    )
    np.testing.assert_array_equal(dense, flat.reshape(300, 3))
    for p in range(0, 300, 50):
        assert dense[p, 1] == pytest.approx(
            stats.percentileofscore(references[p], rewards[p, 1], "weak") / 100
        )


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9),
            st.lists(st.floats(width=32, allow_nan=False), max_size=5),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["weak", "strict", "mid"]),
)
def test_any_finite_or_infinite_rewards_equal_the_definition(prompts, ties):
    references = np.array([s for refs, _ in prompts for s in refs], dtype=np.float32)
    rewards = np.array([r for _, mine in prompts for r in mine], dtype=np.float32)
    q = quantile_rewards(
        rewards,
        references,
        offsets=np.cumsum([0, *(len(mine) for _, mine in prompts)]),
        ref_offsets=np.cumsum([0, *(len(refs) for refs, _ in prompts)]),
        ties=ties,
    )
    expected = [x for refs, mine in prompts for x in by_definition(mine, refs, ties)]
    np.testing.assert_array_equal(q, np.float32(expected))


def test_arrow_list_columns_are_used_as_they_lie():
    column = pa.array([[0.0, 1.0, 2.0], [5.0], [1.0, 3.0]], pa.list_(pa.float32())).slice(1)
    rewards = pa.array([[9.9], [5.0, 4.0], [2.0]], pa.list_(pa.float32())).slice(1)
    q = quantile_rewards(
        rewards.values.to_numpy(),
        column.values.to_numpy(),
        offsets=rewards.offsets,
        ref_offsets=column.offsets,
    )
    np.testing.assert_array_equal(q, np.float32([1.0, 0.0, 0.5]))


def test_a_completion_is_left_out_of_its_own_references():
    references = np.float32([[1, 2, 3, 4]])
    rewards = np.float32([[3, 3, 0.5]])
    mine = np.array([[True, False, False]])
    np.testing.assert_allclose(quantile_rewards(rewards, references, in_reference=mine), [[2 / 3, 3 / 4, 0]])
    inclusive = quantile_rewards(rewards, references, in_reference=mine, self_exclusion=False)
    np.testing.assert_allclose(inclusive, [[3 / 4, 3 / 4, 0]])
    by_index = quantile_rewards(rewards, references, in_reference=np.array([[2, -1, -1]]))
    np.testing.assert_allclose(by_index, [[2 / 3, 3 / 4, 0]])


def test_leaving_one_out_of_many_equals_recounting_without_it():
    rng = np.random.default_rng(3)
    references = rng.integers(0, 6, (40, 12)).astype(np.float32)
    for ties in ("weak", "strict", "mid"):
        q = quantile_rewards(references, references, in_reference=np.ones((40, 12), bool), ties=ties)
        for p, i in [(0, 0), (7, 3), (39, 11)]:
            others = np.delete(references[p], i).tolist()
            assert q[p, i] == pytest.approx(by_definition([references[p, i]], others, ties)[0], abs=1e-7)


def test_marks_that_do_not_fit_the_references_are_refused():
    references, rewards = np.float32([[1, 2, 3]]), np.float32([[2.5]])
    with pytest.raises(DataError, match="no reference reward of its prompt equals it"):
        quantile_rewards(rewards, references, in_reference=np.array([[True]]))
    with pytest.raises(DataError, match="reference sample 1 of its prompt"):
        quantile_rewards(rewards, references, in_reference=np.array([[1]]))
    with pytest.raises(DataError, match="too few for the quantile of its completion 0, itself one of them"):
        quantile_rewards(np.float32([[1]]), np.float32([[1]]), in_reference=np.array([[True]]))


@pytest.mark.parametrize("probabilities", [[1.0], [0.7, 0.3], [0.05, 0.9, 0.05]])
@pytest.mark.parametrize("loo", [False, True])
def test_randomized_ties_are_uniform_for_discrete_rewards(probabilities, loo):
    # under the reference, reward and references are draws of one distribution, here with heavy ties
    rng = np.random.default_rng(4)
    references = rng.choice(len(probabilities), (40_000, 5), p=probabilities).astype(np.float32)
    rewards = (
        references[:, :1]
        if loo
        else rng.choice(len(probabilities), (40_000, 1), p=probabilities).astype(np.float32)
    )
    mine = np.ones((40_000, 1), bool) if loo else None
    q = quantile_rewards(rewards, references, ties="randomized", in_reference=mine, seed=5)
    assert stats.kstest(q.ravel(), "uniform").pvalue > 1e-3
    again = quantile_rewards(rewards, references, ties="randomized", in_reference=mine, seed=5)
    other = quantile_rewards(rewards, references, ties="randomized", in_reference=mine, seed=6)
    np.testing.assert_array_equal(q, again)
    assert not np.array_equal(q, other)


def test_weak_quantiles_without_ties_are_uniform_on_their_grid():
    rng = np.random.default_rng(6)
    q = quantile_rewards(rng.normal(size=(50_000, 1)), rng.normal(size=(50_000, 4)))
    counts = np.bincount((q.ravel() * 4).round().astype(int), minlength=5)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_nan_rewards_are_refused_with_their_prompt():
    rewards = np.zeros((3, 2), np.float32)
    references = np.zeros((3, 4), np.float32)
    references[2, 1] = np.nan
    with pytest.raises(DataError, match="ref_rewards: prompt 2 has a NaN"):
        quantile_rewards(rewards, references)


def test_a_prompt_without_references_is_refused_by_number():
    with pytest.raises(DataError, match="prompt 1 has 0 reference rewards"):
        quantile_rewards(np.zeros((2, 1)), np.zeros(3), ref_offsets=[0, 3, 3])
    # where nothing is asked of it, it does no harm, at the end neither
    q = quantile_rewards([1.0], [0.0, 2.0], offsets=[0, 0, 1, 1], ref_offsets=[0, 0, 2, 2])
    assert q.tolist() == [0.5]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="each prompt needs one row in both"):
        quantile_rewards(np.zeros((2, 1)), np.zeros((3, 4)))
    with pytest.raises(DataError, match="expected \\(prompts, completions\\)"):
        quantile_rewards(np.zeros(2), np.zeros((2, 4)))
    with pytest.raises(DataError, match="offsets must ascend"):
        quantile_rewards(np.zeros((1, 1)), np.zeros(3), ref_offsets=[0, 5])
    with pytest.raises(ConfigError, match="ties"):
        quantile_rewards(np.zeros((1, 1)), np.zeros((1, 1)), ties="average")


def test_bounds_are_the_binomial_interval():
    for n in (1, 3, 10, 50):
        q = np.arange(n + 1, dtype=np.float32)[None] / np.float32(n)
        low, high = quantile_bounds(q, [n], confidence=0.9)
        for k in range(n + 1):
            exact = stats.binomtest(k, n).proportion_ci(0.9, method="exact")
            assert (low[0, k], high[0, k]) == pytest.approx((exact.low, exact.high), abs=1e-9)
        low, high = quantile_bounds(q, [n], confidence=0.9, method="jeffreys")
        inner = stats.beta(np.arange(n + 1) + 0.5, n - np.arange(n + 1) + 0.5)
        np.testing.assert_allclose(low[0, 1:], inner.ppf(0.05)[1:], rtol=1e-9)
        np.testing.assert_allclose(high[0, :-1], inner.ppf(0.95)[:-1], rtol=1e-9)
        assert low[0, 0] == 0
        assert high[0, -1] == 1


def test_bounds_cover_the_true_quantile_as_often_as_they_say():
    for truth in (0.02, 0.3, 0.5, 0.97):
        k = np.arange(21)
        weight = stats.binom.pmf(k, 20, truth)
        low, high = quantile_bounds(k / 20, np.full(21, 20))
        assert weight[(low <= truth) & (truth <= high)].sum() >= 0.95


def test_standard_error_is_that_of_the_estimate():
    rng = np.random.default_rng(7)
    truth, n = 0.3, 25
    estimates = quantile_rewards(np.full((40_000, 1), truth), rng.random((40_000, n)))
    assert estimates.std() == pytest.approx(float(standard_error(truth, n)), rel=0.02)
    assert float(standard_error(0.0, 10)) == 0.0
    expected = stats.beta(0.5, 10.5).std()
    assert float(standard_error(0.0, 10, method="jeffreys")) == pytest.approx(expected)


def test_importing_quantiles_imports_neither_torch_nor_scipy():
    probe = "import sys, qrpo.method.quantiles; print([m for m in ('torch', 'scipy', 'pandas') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_ragged_references_are_not_padded_to_the_longest():
    rng = np.random.default_rng(8)
    counts = np.array([500_000, *[2] * 50_000])
    references = rng.normal(size=counts.sum()).astype(np.float32)
    rewards = rng.normal(size=len(counts)).astype(np.float32)
    tracemalloc.start()
    quantiles = quantile_rewards(
        rewards,
        references,
        offsets=np.arange(len(counts) + 1),
        ref_offsets=np.concatenate([[0], np.cumsum(counts)]),
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20  # padded, a byte for each comparison alone would be 25 GB
    assert quantiles[0] == np.float32(np.mean(references[:500_000] <= rewards[0]))
