"""Partition functions against enumeration of their definitions."""

import itertools

import numpy as np
import pytest
import torch

from qrpo.errors import ConfigError, DataError
from qrpo.method.partition import log_z, quantile_grid
from qrpo.method.quantiles import quantile_rewards
from qrpo.method.transforms import get_transform

TRANSFORMS = ["identity", "log", "normal-icdf", "logit", "power"]


def clamped(transform: str, q: float, n: int) -> float:
    """The transform of a quantile moved one sample inwards at an infinite end."""
    low = min(1 / n, 0.5) if transform in ("log", "normal-icdf", "logit") else 0.0
    high = 1 - low if transform in ("normal-icdf", "logit") else 1.0
    return float(get_transform(transform)(np.float64(min(max(q, low), high))))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_finite_is_the_mean_over_all_orders_of_completion_and_references(transform, n, beta):
    # n + 1 exchangeable draws without ties: every order is equally likely; the last one is the completion
    terms = [
        np.exp(clamped(transform, float(quantile_rewards([[order[-1]]], [order[:-1]])[0, 0]), n) / beta)
        for order in itertools.permutations(range(n + 1))
    ]
    assert log_z(transform, beta, partition="finite", num_ref=n) == pytest.approx(
        np.log(np.mean(terms)), rel=1e-10
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_finite_with_self_inclusion_is_the_mean_over_the_references_themselves(transform):
    references = np.array([[0.3, -1.0, 2.0, 0.7]])
    inclusive = quantile_rewards(references, references)[0]
    terms = [np.exp(clamped(transform, q, 4) / 0.3) for q in inclusive]
    ours = log_z(transform, 0.3, partition="finite", num_ref=4, self_included=True)
    assert ours == pytest.approx(np.log(np.mean(terms)), rel=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_finite_with_one_left_out_is_the_case_of_one_reference_less(transform):
    references = np.array([[0.3, -1.0, 2.0, 0.7]])
    left_out = quantile_rewards(references, references, in_reference=np.ones((1, 4), bool))[0]
    terms = [np.exp(clamped(transform, q, 3) / 0.3) for q in left_out]
    assert log_z(transform, 0.3, partition="finite", num_ref=3) == pytest.approx(
        np.log(np.mean(terms)), rel=1e-10
    )


@pytest.mark.parametrize("transform", ["identity", "power", "log"])
def test_finite_tends_to_continuous(transform):
    far = abs(log_z(transform, 0.3, partition="finite", num_ref=100) - log_z(transform, 0.3))
    near = abs(log_z(transform, 0.3, partition="finite", num_ref=10_000) - log_z(transform, 0.3))
    assert near < 2e-3
    assert near < far / 20


def test_the_continuous_formula_is_far_off_for_three_references():
    # at beta = 0.1 the top grid point alone carries Z: log(e^10/4) against log(e^10/10)
    gap = log_z("identity", 0.1, partition="finite", num_ref=3) - log_z("identity", 0.1)
    assert 0.9 < gap < 1.0


@pytest.mark.parametrize("transform", ["identity", "log", "normal-icdf", "power"])
def test_no_partition_overflows_or_loses_accuracy(transform):
    betas = np.geomspace(1e-4, 1e4, 50)
    for kind in ({"partition": "finite", "num_ref": 7}, {"partition": "continuous"}):
        wide = log_z(transform, betas, **kind)
        narrow = log_z(transform, betas.astype(np.float32), **kind)
        assert narrow.dtype == np.float32
        assert np.isfinite(wide).all()
        np.testing.assert_allclose(narrow, wide, rtol=5e-7)
    # far above, log Z tends to the mean of f over the grid divided by beta
    grid = np.array([clamped(transform, k / 7, 7) for k in range(8)])
    large = log_z(transform, 1e4, partition="finite", num_ref=7)
    second_order = grid.mean() / 1e4 + grid.var() / 2e8
    assert large == pytest.approx(second_order, rel=1e-6)


def test_empirical_is_exact_for_discrete_rewards_with_known_probabilities():
    # pass rates 0, 1/2, 1 with counts 5, 3, 2: q takes 0.5, 0.8, 1.0
    references = np.float32([[0] * 5 + [0.5] * 3 + [1] * 2])
    ref_quantiles = quantile_rewards(references, references)
    ours = log_z("identity", 0.2, partition="empirical", ref_quantiles=ref_quantiles)
    expected = np.log(0.5 * np.exp(0.5 / 0.2) + 0.3 * np.exp(0.8 / 0.2) + 0.2 * np.exp(1 / 0.2))
    assert ours[0] == pytest.approx(expected, rel=1e-6)


def test_empirical_takes_distinct_levels_with_counts_or_probabilities():
    every = log_z(
        "log", 0.2, partition="empirical", ref_quantiles=np.array([0.5] * 5 + [0.8] * 3 + [1.0] * 2)
    )
    levels = np.array([0.5, 0.8, 1.0])
    counts = log_z("log", 0.2, partition="empirical", ref_quantiles=levels, ref_weights=np.array([5, 3, 2]))
    assert counts == pytest.approx(every, rel=1e-14)
    with pytest.raises(ConfigError, match="needs num_ref"):
        log_z("log", 0.2, partition="empirical", ref_quantiles=levels, ref_weights=np.array([0.5, 0.3, 0.2]))
    probabilities = log_z(
        "log",
        0.2,
        partition="empirical",
        ref_quantiles=levels,
        ref_weights=np.array([0.5, 0.3, 0.2]),
        num_ref=10,
    )
    assert probabilities == pytest.approx(every, rel=1e-14)


def test_empirical_ignores_padding_and_broadcasts_over_completions():
    ref_quantiles = np.array([[0.25, 0.5, 0.75, 1.0], [0.5, 1.0, np.nan, np.nan]])
    betas = np.array([[0.1, 1.0, 1e3], [0.1, 1.0, 1e3]])
    ours = log_z("power", betas, partition="empirical", ref_quantiles=ref_quantiles[:, None])
    for p, k in np.ndindex(2, 3):
        levels = ref_quantiles[p][~np.isnan(ref_quantiles[p])] ** 2
        assert ours[p, k] == pytest.approx(np.log1p(np.mean(np.expm1(levels / betas[p, k]))), rel=1e-12)
    with pytest.raises(DataError, match="no reference quantiles"):
        log_z("identity", 0.1, partition="empirical", ref_quantiles=np.full((1, 3), np.nan))


def test_the_answer_is_of_the_kind_of_beta():
    assert isinstance(log_z("identity", 0.1), float)
    assert isinstance(log_z("identity", 0.1, partition="finite", num_ref=5), float)
    assert log_z("identity", np.float32([0.1, 0.2])).dtype == np.float32
    tensor = log_z(
        "identity", torch.tensor([[0.1], [0.2]]), partition="finite", num_ref=torch.tensor([[3, 5]])
    )
    assert tensor.shape == (2, 2)
    assert tensor.dtype == torch.float32
    mixed = log_z("identity", 0.1, partition="finite", num_ref=torch.tensor([3, 5]))
    expected = [log_z("identity", 0.1, partition="finite", num_ref=n) for n in (3, 5)]
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=1e-6)


def test_what_a_partition_needs_is_asked_for():
    with pytest.raises(ConfigError, match="expected continuous, finite or empirical"):
        log_z("identity", 0.1, partition="exact")
    with pytest.raises(ConfigError, match="num_ref"):
        log_z("identity", 0.1, partition="finite")
    with pytest.raises(ConfigError, match="ref_quantiles"):
        log_z("identity", 0.1, partition="empirical")
    with pytest.raises(DataError, match="at least 1, got 0"):
        log_z("identity", 0.1, partition="finite", num_ref=0)
    with pytest.raises(ConfigError, match="beta: must be above 0"):
        log_z("identity", -0.1, partition="finite", num_ref=3)


def test_the_grid_is_what_estimated_quantiles_can_be():
    np.testing.assert_allclose(quantile_grid(4), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantile_grid(4, self_included=True), [0.25, 0.5, 0.75, 1])
