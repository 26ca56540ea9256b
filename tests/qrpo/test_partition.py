"""Partition functions against enumeration of their definitions."""

import itertools

import numpy as np
import pytest
import torch

from qrpo.errors import ConfigError, DataError
from qrpo.method.partition import log_z, quantile_grid
from qrpo.method.quantiles import quantile_rewards
from qrpo.method.transforms import get_transform
from tests.support.refusals import refuses

TRANSFORMS = ["identity", "log", "normal-icdf", "logit", "power"]


def clamped(transform, q, n):
    """The transform of a quantile moved one sample inwards at an infinite end."""
    low = min(1 / n, 0.5) if transform in ("log", "normal-icdf", "logit") else 0.0
    high = 1 - low if transform in ("normal-icdf", "logit") else 1.0
    return float(get_transform(transform)(np.float64(min(max(q, low), high))))


def enumerated(transform, quantiles, n, beta):
    return np.log(np.mean([np.exp(clamped(transform, float(q), n) / beta) for q in quantiles]))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_finite_is_the_mean_over_all_orders_of_completion_and_references(transform, n, beta):
    # n + 1 exchangeable draws without ties: every order is equally likely; the last one is the completion
    orders = itertools.permutations(range(n + 1))
    quantiles = [quantile_rewards([[order[-1]]], [order[:-1]])[0, 0] for order in orders]
    expected = enumerated(transform, quantiles, n, beta)
    assert log_z(transform, beta, partition="finite", num_ref=n) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_finite_with_self_inclusion_and_with_one_left_out(transform):
    references = np.array([[0.3, -1.0, 2.0, 0.7]])
    inclusive = quantile_rewards(references, references)[0]
    ours = log_z(transform, 0.3, partition="finite", num_ref=4, self_included=True)
    assert ours == pytest.approx(enumerated(transform, inclusive, 4, 0.3), rel=1e-10)
    left_out = quantile_rewards(references, references, in_reference=np.ones((1, 4), bool))[0]
    ours = log_z(transform, 0.3, partition="finite", num_ref=3)
    assert ours == pytest.approx(enumerated(transform, left_out, 3, 0.3), rel=1e-10)


@pytest.mark.parametrize("transform", ["identity", "power", "log"])
def test_finite_tends_to_continuous(transform):
    far, near = (
        abs(log_z(transform, 0.3, partition="finite", num_ref=n) - log_z(transform, 0.3))
        for n in (100, 10_000)
    )
    assert near < min(2e-3, far / 20)


def test_the_continuous_formula_is_far_off_for_three_references():
    # at beta = 0.1 the top grid point alone carries Z: log(e^10/4) against log(e^10/10)
    assert 0.9 < log_z("identity", 0.1, partition="finite", num_ref=3) - log_z("identity", 0.1) < 1.0


@pytest.mark.parametrize("transform", ["identity", "log", "normal-icdf", "power"])
def test_no_partition_overflows_or_loses_accuracy(transform):
    betas = np.geomspace(1e-4, 1e4, 50)
    for kind in ({"partition": "finite", "num_ref": 7}, {"partition": "continuous"}):
        wide, narrow = (log_z(transform, b, **kind) for b in (betas, betas.astype(np.float32)))
        assert narrow.dtype == np.float32
        assert np.isfinite(wide).all()
        np.testing.assert_allclose(narrow, wide, rtol=5e-7)
    # far above, log Z tends to the mean of f over the grid divided by beta
    grid = np.array([clamped(transform, k / 7, 7) for k in range(8)])
    large = log_z(transform, 1e4, partition="finite", num_ref=7)
    assert large == pytest.approx(grid.mean() / 1e4 + grid.var() / 2e8, rel=1e-6)


def test_empirical_is_exact_for_discrete_rewards():
    # pass rates 0, 1/2, 1 with counts 5, 3, 2: q takes 0.5, 0.8, 1.0
    references = np.float32([[0] * 5 + [0.5] * 3 + [1] * 2])
    every = quantile_rewards(references, references)
    ours = log_z("identity", 0.2, partition="empirical", ref_quantiles=every)
    expected = np.log(0.5 * np.exp(0.5 / 0.2) + 0.3 * np.exp(0.8 / 0.2) + 0.2 * np.exp(1 / 0.2))
    assert ours[0] == pytest.approx(expected, rel=1e-6)
    # distinct levels with counts, or with probabilities
    levels = {"partition": "empirical", "ref_quantiles": np.array([0.5, 0.8, 1.0])}
    shares = {"ref_weights": np.array([0.5, 0.3, 0.2])}
    expected = log_z("log", 0.2, partition="empirical", ref_quantiles=every.astype(np.float64))[0]
    counted = log_z("log", 0.2, **levels, ref_weights=np.array([5, 3, 2]))
    assert counted == pytest.approx(expected, rel=1e-7)
    assert log_z("log", 0.2, **levels, **shares, num_ref=10) == pytest.approx(counted, rel=1e-14)
    refuses(ConfigError, "needs num_ref", log_z, "log", 0.2, **levels, **shares)


def test_empirical_ignores_padding_and_broadcasts_over_completions():
    ref_quantiles = np.array([[0.25, 0.5, 0.75, 1.0], [0.5, 1.0, np.nan, np.nan]])
    betas = np.array([[0.1, 1.0, 1e3], [0.1, 1.0, 1e3]])
    ours = log_z("power", betas, partition="empirical", ref_quantiles=ref_quantiles[:, None])
    for p, k in np.ndindex(2, 3):
        levels = ref_quantiles[p][~np.isnan(ref_quantiles[p])] ** 2
        assert ours[p, k] == pytest.approx(np.log1p(np.mean(np.expm1(levels / betas[p, k]))), rel=1e-12)


def test_the_answer_is_of_the_kind_of_beta():
    finite = {"partition": "finite", "num_ref": torch.tensor([3, 5])}
    assert isinstance(log_z("identity", 0.1), float)
    assert isinstance(log_z("identity", 0.1, partition="finite", num_ref=5), float)
    assert log_z("identity", np.float32([0.1, 0.2])).dtype == np.float32
    tensor = log_z("identity", torch.tensor([[0.1], [0.2]]), **finite)
    assert (tensor.shape, tensor.dtype) == ((2, 2), torch.float32)
    expected = [log_z("identity", 0.1, partition="finite", num_ref=n) for n in (3, 5)]
    np.testing.assert_allclose(log_z("identity", 0.1, **finite).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "match", "beta", "options"),
    [
        (ConfigError, "expected continuous, finite or empirical", 0.1, {"partition": "exact"}),
        (ConfigError, "num_ref", 0.1, {"partition": "finite"}),
        (ConfigError, "ref_quantiles", 0.1, {"partition": "empirical"}),
        (DataError, "at least 1, got 0", 0.1, {"partition": "finite", "num_ref": 0}),
        (ConfigError, "beta: must be above 0", -0.1, {"partition": "finite", "num_ref": 3}),
        (
            DataError,
            "no reference quantiles",
            0.1,
            {"partition": "empirical", "ref_quantiles": np.array([[np.nan]])},
        ),
    ],
)
def test_what_a_partition_needs_is_asked_for(error, match, beta, options):
    refuses(error, match, log_z, "identity", beta, **options)


def test_the_grid_is_what_estimated_quantiles_can_be():
    np.testing.assert_allclose(quantile_grid(4), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantile_grid(4, self_included=True), [0.25, 0.5, 0.75, 1])
