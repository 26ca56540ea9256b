"""Each closed form against quadrature of its definition, and against mpmath-free identities."""

import pickle

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from qrpo.errors import ConfigError
from qrpo.method.partition import log_z
from qrpo.method.quadrature import tilted_nodes
from qrpo.method.transforms import (
    Identity,
    Log,
    Logit,
    NormalIcdf,
    Power,
    Transform,
    from_function,
    get_transform,
)

BETAS = np.geomspace(1e-4, 10.0, 41)
CLOSED = [
    Identity(),
    Log(),
    NormalIcdf(),
    Power(),
    Power(exponent=0.5),
    Power(exponent=7.0),
    Power(exponent=1.0),
]


def quadrature_log_z(transform: Transform, beta: float) -> float:
    return tilted_nodes(transform.at_logit, 1.0 / beta).log_z


@pytest.mark.parametrize("transform", CLOSED, ids=repr)
def test_closed_form_equals_quadrature_from_beta_1e_4_to_10(transform):
    expected = np.array([quadrature_log_z(transform, beta) for beta in BETAS])
    np.testing.assert_allclose(transform.log_z(BETAS), expected, rtol=2e-12)


def test_logit_equals_quadrature_over_its_domain():
    betas = 1.0 + np.geomspace(1e-3, 9.0, 30)
    expected = np.array([quadrature_log_z(Logit(), beta) for beta in betas])
    np.testing.assert_allclose(Logit().log_z(betas), expected, rtol=2e-11)


@pytest.mark.parametrize("transform", [*CLOSED, Logit()], ids=repr)
def test_quadrature_equals_scipy_where_scipy_can(transform):
    for beta in (1.5, 4.0, 10.0):
        expected, _ = integrate.quad(
            lambda t, beta=beta: float(np.exp(transform(np.float64(t)) / beta)), 0, 1, epsabs=1e-13, limit=500
        )
        assert quadrature_log_z(transform, beta) == pytest.approx(np.log(expected), rel=1e-8)


@pytest.mark.parametrize("transform", [*CLOSED, Logit()], ids=repr)
def test_beta_log_z_keeps_full_relative_accuracy_in_float32(transform):
    betas = BETAS[transform.min_beta < BETAS].astype(np.float32)
    exact = betas.astype(np.float64) * transform.log_z(betas.astype(np.float64))
    for beta in (betas, torch.from_numpy(betas)):
        logarithm = transform.log_z(beta)
        assert logarithm.dtype == beta.dtype
        product = np.asarray(beta * logarithm)
        assert np.isfinite(product).all()
        np.testing.assert_allclose(product, exact, rtol=3e-7)


def test_identity_is_exact_at_both_extremes():
    # log(beta (e^(1/beta) - 1)): 1/beta + log(beta) far below, 1/(2 beta) + 1/(24 beta^2) far above
    assert float(Identity().log_z(1e-4)) == pytest.approx(1e4 + np.log(1e-4), rel=1e-15)
    assert float(Identity().log_z(1e6)) == pytest.approx(0.5e-6 + 1e-12 / 24, rel=1e-15)
    betas = np.geomspace(0.05, 10, 200)
    np.testing.assert_allclose(Identity().log_z(betas), np.log(betas * np.expm1(1 / betas)), rtol=1e-13)


def test_power_one_is_the_identity():
    np.testing.assert_allclose(Power(exponent=1.0).log_z(BETAS), Identity().log_z(BETAS), rtol=1e-14)


def test_logit_partition_is_a_beta_function():
    betas = np.array([1.001, 1.2, 1.999, 2.0, 2.001, 5.0])
    np.testing.assert_allclose(Logit().log_z(betas), special.betaln(1 + 1 / betas, 1 - 1 / betas), rtol=1e-11)


def test_logit_refuses_a_beta_whose_partition_diverges():
    with pytest.raises(ConfigError, match=r"got 1 for the transform 'logit'.*beta > 1"):
        Logit().log_z(np.array([2.0, 1.0]))
    with pytest.raises(ConfigError, match="diverges"):
        tilted_nodes(Logit().at_logit, 1.0 / 0.9)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_beta_that_is_not_positive_is_refused(beta):
    with pytest.raises(ConfigError, match="beta"):
        Identity().log_z(beta)


@pytest.mark.parametrize("kind", ["identity", "log", "normal-icdf", "logit", "power"])
def test_numpy_and_torch_agree_elementwise(kind):
    transform = get_transform(kind)
    q = np.linspace(0.01, 0.99, 33)
    np.testing.assert_allclose(transform(torch.from_numpy(q)).numpy(), transform(q), rtol=1e-12, atol=1e-14)
    x = special.logit(q)
    np.testing.assert_allclose(transform.at_logit(x), transform(q), rtol=1e-10, atol=1e-12)


def test_normal_icdf_is_the_inverse_of_the_normal_distribution_function():
    q = np.array([1e-9, 0.1, 0.5, 0.9])
    np.testing.assert_allclose(get_transform("normal-icdf")(q), stats.norm.ppf(q), rtol=1e-12, atol=1e-15)


def test_a_user_function_gets_its_partition_by_quadrature():
    clipped = from_function(lambda t: np.minimum(t, 0.5), name="satisficing")
    # integral over t < 1/2 of e^(ut), and half of e^(u/2)
    for beta in (1e-3, 0.1, 1.0, 10.0):
        u = 1 / beta
        expected = u / 2 + np.log(-np.expm1(-u / 2) / u + 0.5)
        assert float(clipped.log_z(beta)) == pytest.approx(expected, rel=1e-11)
    step = from_function(lambda t: (t > 0.75).astype(float))
    assert float(step.log_z(0.1)) == pytest.approx(np.log(0.75 + 0.25 * np.exp(10)), rel=1e-12)
    same = from_function(lambda t: t)
    np.testing.assert_allclose(
        same.log_z(BETAS[BETAS >= 1e-3]), Identity().log_z(BETAS[BETAS >= 1e-3]), rtol=1e-11
    )
    tensor = torch.tensor([[0.25, 0.8]])
    torch.testing.assert_close(clipped(tensor), torch.tensor([[0.25, 0.5]]))


def test_a_config_can_name_a_users_function_or_transform(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from qrpo.method.transforms import Transform, from_function\n"
        "def cubed(t):\n    return t**3\n"
        "steep = from_function(lambda t: np.log(t), name='steep', open_ends=(True, False))\n"
        "class Halved(Transform):\n    def __call__(self, q):\n        return q / 2\n"
    )
    named = get_transform(f"{tmp_path}/mine.py:cubed")
    assert float(named.log_z(0.1)) == pytest.approx(float(Power(exponent=3).log_z(0.1)), rel=1e-11)
    assert get_transform(f"{tmp_path}/mine.py:cubed") is named
    assert get_transform(f"{tmp_path}/mine.py:steep").clamp(np.zeros(1), 4).tolist() == [0.25]
    assert float(log_z(f"{tmp_path}/mine.py:Halved", 0.1)) == pytest.approx(
        float(log_z("identity", 0.2)), rel=1e-11
    )
    assert pickle.loads(pickle.dumps(from_function(np.sqrt)))(0.25) == 0.5  # noqa: S301


def test_a_user_function_beyond_float64_quantiles_is_refused_not_guessed():
    plain_logit = from_function(lambda t: np.log(t / (1 - t)), open_ends=(True, True))
    assert float(plain_logit.log_z(4.0)) == pytest.approx(float(Logit().log_z(4.0)), rel=1e-9)
    with pytest.raises(ConfigError, match="cannot distinguish from 0 or 1"):
        plain_logit.log_z(1.05)


def test_a_user_function_that_is_not_a_number_is_refused():
    with pytest.raises(ConfigError, match="not a finite number at quantile"):
        from_function(lambda t: np.where(t > 0.5, np.nan, t)).log_z(1.0)


def test_clamping_moves_open_ends_one_reference_sample_inwards():
    q = np.array([0.0, 0.5, 1.0], dtype=np.float32)
    np.testing.assert_array_equal(get_transform("identity").clamp(q, 4), q)
    np.testing.assert_array_equal(get_transform("log").clamp(q, 4), np.float32([0.25, 0.5, 1.0]))
    np.testing.assert_array_equal(get_transform("normal-icdf").clamp(q, 4), np.float32([0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(
        get_transform("logit", edge=0.5).clamp(q, 4), np.float32([0.125, 0.5, 0.875])
    )
    per_prompt = get_transform("normal-icdf").clamp(
        torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[4], [1]])
    )
    torch.testing.assert_close(per_prompt, torch.tensor([[0.25, 0.75], [0.5, 0.5]]))


def test_a_scale_divides_beta():
    scale = np.array([[0.5], [2.0], [0.0]])
    scaled = get_transform("scaled-normal-icdf").scaled(scale)
    q = np.array([[0.2, 0.9]])
    np.testing.assert_allclose(scaled(q), scale * stats.norm.ppf(q))
    np.testing.assert_allclose(log_z(scaled, 0.1), scale**2 / (2 * 0.1**2))
    np.testing.assert_allclose(
        log_z(scaled, np.float64(0.1), partition="finite", num_ref=5)[:2, 0],
        [log_z("normal-icdf", 0.1 / s, partition="finite", num_ref=5) for s in (0.5, 2.0)],
    )


def test_a_scaled_transform_without_scales_is_refused():
    with pytest.raises(ConfigError, match="one scale per prompt"):
        get_transform("scaled-normal-icdf").log_z(0.1)
    with pytest.raises(ConfigError, match="one scale per prompt"):
        log_z("scaled-normal-icdf", 0.1, partition="finite", num_ref=3)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="identity, log, normal-icdf"):
        get_transform("sigmoid")
    with pytest.raises(ConfigError, match="exponent"):
        get_transform("power", exponent=0)
    with pytest.raises(ConfigError, match="parameters"):
        get_transform("log", exponent=2)
