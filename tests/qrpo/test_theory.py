"""The optimum's promises against closed forms, simulation, and enumeration."""

import json

import numpy as np
import pytest
from scipy import integrate, stats

from qrpo.errors import ConfigError, DataError
from qrpo.method import theory
from qrpo.method.optimum import expected_reward, optimum, optimum_cdf, optimum_density
from qrpo.method.transforms import get_transform

BETAS = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]


@pytest.mark.parametrize("beta", BETAS)
def test_optima_have_their_closed_forms(beta):
    u, t = 1 / beta, np.array([0.001, 0.2, 0.5, 0.99, 0.999])
    identity, log = optimum("identity", beta), optimum("log", beta)
    win_rate = -1 / np.expm1(-u) - 1 / u
    assert (identity.win_rate, identity.transformed_reward) == pytest.approx((win_rate, win_rate), rel=1e-9)
    log_z = u + np.log(-np.expm1(-u) / u)
    assert identity.kl == pytest.approx(u * win_rate - log_z, rel=1e-6)
    assert identity.gain == pytest.approx(beta * log_z - 0.5, rel=1e-6)
    # the logarithm's density is (1 + u) t^u: Beta(1 + u, 1)
    assert log.win_rate == pytest.approx((1 + u) / (2 + u), rel=1e-9)
    assert log.kl == pytest.approx(np.log1p(u) - u / (1 + u), rel=1e-8)
    np.testing.assert_allclose(optimum_density("log", beta, t), stats.beta(1 + u, 1).pdf(t), rtol=1e-7)
    np.testing.assert_allclose(optimum_cdf("log", beta, t), t ** (1 + u), rtol=1e-9, atol=1e-14)
    if beta > 1e-4:  # the inverse normal distribution function's is a shifted normal
        normal = optimum("normal-icdf", beta)
        assert normal.win_rate == pytest.approx(stats.norm.cdf(u / np.sqrt(2)), rel=1e-9)
        assert normal.kl == pytest.approx(u * u / 2, rel=1e-6)
        assert normal.transformed_reward == pytest.approx(u, rel=1e-8)
        t = np.array([0.0, 0.2, 0.5, 0.99, 1.0])
        expected = stats.norm.cdf(stats.norm.ppf(t) - u)
        np.testing.assert_allclose(optimum_cdf("normal-icdf", beta, t), expected, rtol=1e-7, atol=1e-14)


def test_scaled_transforms_promise_for_the_average_prompt():
    assert optimum("scaled-normal-icdf", 0.5) == optimum("normal-icdf", 0.5)
    assert theory.summary("scaled-normal-icdf", 0.5, 10)["log_z_used"] == pytest.approx(2.0)


@pytest.mark.parametrize("transform", ["identity", "log", "power", "normal-icdf"])
def test_the_density_integrates_to_one_and_gives_the_win_rate(transform):
    mass, _ = integrate.quad(lambda t: float(optimum_density(transform, 0.4, t)), 0, 1, limit=200)
    mean, _ = integrate.quad(lambda t: float(t * optimum_density(transform, 0.4, t)), 0, 1, limit=200)
    assert mass == pytest.approx(1, abs=1e-6)
    assert mean == pytest.approx(optimum(transform, 0.4).win_rate, abs=1e-6)


def test_no_policy_does_better_than_the_optimum():
    # over all densities on a grid of quantiles: random ones, and small changes of the optimum
    rng = np.random.default_rng(0)
    t = (np.arange(400) + 0.5) / 400
    best = optimum("identity", 0.2)
    for _ in range(50):
        density = optimum_density("identity", 0.2, t) * np.exp(0.3 * rng.normal(size=400))
        density /= density.mean()
        value = np.mean(density * t) - 0.2 * np.mean(density * np.log(density)) - 0.5
        assert value < best.gain


def test_expected_reward_equals_the_integral_over_the_quantile_function():
    # rewards at the mid-quantiles of a normal: E_pi*[r] -> integral of Phi^-1(t) p(t) dt
    n = 2000
    rewards = stats.norm.ppf((np.arange(n) + 0.5) / n)
    rng = np.random.default_rng(1)
    ours = expected_reward("identity", 0.3, rng.permutation(rewards)[None])
    integral, _ = integrate.quad(
        lambda t: float(stats.norm.ppf(t) * optimum_density("identity", 0.3, t)), 0, 1, limit=300
    )
    assert ours[0] == pytest.approx(integral, abs=2e-3)


def test_expected_reward_takes_ragged_prompts_and_discrete_rewards():
    ragged = expected_reward("log", 0.5, [3.0, 1.0, 2.0, 5.0], ref_offsets=[0, 3, 4, 4])
    weights = np.diff((np.arange(4) / 3) ** 3)
    np.testing.assert_allclose(ragged[:2], [weights @ [1, 2, 3], 5.0], rtol=1e-9)
    assert np.isnan(ragged[2])
    with pytest.raises(DataError, match="ref_offsets"):
        expected_reward("log", 0.5, [1.0, 2.0])


@pytest.mark.parametrize("n", [1, 3, 10, 50, 1000])
def test_the_identity_has_signal_to_noise_n_over_2(n):
    noise = theory.estimate_noise("identity", n)
    assert noise.snr == pytest.approx(n / 2, rel=1e-9)
    assert noise.noise == pytest.approx(np.sqrt(1 / (6 * n)), rel=1e-9)
    assert noise.signal == pytest.approx(np.sqrt(1 / 12), rel=1e-9)


@pytest.mark.parametrize("transform", ["log", "normal-icdf", "logit", "power"])
def test_noise_of_a_transform_equals_simulation(transform):
    rng = np.random.default_rng(2)
    f = get_transform(transform)
    q = rng.random(400_000)
    estimate = f(f.clamp(rng.binomial(12, q) / 12, 12))
    noise = theory.estimate_noise(transform, 12)
    assert noise.noise == pytest.approx(np.sqrt(np.mean((estimate - f(q)) ** 2)), rel=0.01)
    assert noise.signal == pytest.approx(f(q).std(), rel=0.01)


def test_pairs_told_apart_equals_simulation():
    rng = np.random.default_rng(3)
    pair, references = rng.random((100_000, 2, 1)), rng.random((100_000, 1, 5))
    counts = (references <= pair).sum(-1)
    expected = (counts[:, 0] != counts[:, 1]).mean()
    assert theory.estimate_noise("identity", 5).pairs_told_apart == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("transform", ["identity", "log", "normal-icdf"])
def test_attained_equals_tilting_a_real_population(transform):
    # a population of 4000 completions per prompt, its own quantiles, 10 references drawn from it; 200 prompts
    rng = np.random.default_rng(4)
    f, beta, m, n = get_transform(transform), 0.5, 4000, 10
    truth = (np.arange(m) + 0.5) / m
    values, kls, wins = [], [], []
    for _ in range(400):
        references = np.sort(rng.random(n))
        levels = f(f.clamp(np.searchsorted(references, truth) / n, n)) / beta
        weight = np.exp(levels - levels.max())
        weight /= weight.sum()
        kl = (weight * np.log(weight * m)).sum()
        values.append((weight * f(truth)).sum() - beta * kl - f(truth).mean())
        kls.append(kl)
        wins.append((weight * truth).sum())
    got = theory.attained(transform, beta, n)
    assert got.gain == pytest.approx(np.mean(values), abs=4 * np.std(values) / 20 + 2e-3)
    assert got.kl == pytest.approx(np.mean(kls), abs=4 * np.std(kls) / 20)
    assert got.win_rate == pytest.approx(np.mean(wins), abs=4 * np.std(wins) / 20)


def test_more_references_attain_more_and_enough_is_enough():
    shares = [theory.attained("identity", 0.1, n).share for n in (1, 3, 10, 50, 200)]
    assert shares == sorted(shares)
    assert shares[-1] < 1
    enough = theory.enough_references("identity", 0.1, share=0.95)
    assert enough == 20
    assert theory.enough_references("identity", 0.1, share=0.95, candidates=(1, 2)) is None


def test_summary_is_json_and_names_everything():
    numbers = theory.summary("identity", 0.1, 50)
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["win_rate"] == pytest.approx(0.90005, abs=1e-5)
    assert numbers["snr"] == pytest.approx(25)
    assert numbers["log_z_used"] == pytest.approx(numbers["log_z"])
    assert "snr" not in theory.summary("log", 0.1)
    with pytest.raises(ConfigError, match="whole number"):
        theory.attained("log", 0.1, 0)


def test_tables_have_a_row_per_setting():
    rows = theory.theory_table("identity", 0.1, (3, 50))
    assert [row["num_ref"] for row in rows] == [3, 50]
    assert rows[0]["log_z_error"] == pytest.approx(-0.9527, abs=1e-3)
    betas = theory.beta_table("normal-icdf", [1.0, 0.5])
    assert [row["kl"] for row in betas] == pytest.approx([0.5, 2.0])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_written(tmp_path, suffix):
    path = tmp_path / f"theory.{suffix}"
    theory.plot_theory(path, "log", 0.3, 10, num_refs=(1, 10, 100))
    assert path.stat().st_size > 5000
