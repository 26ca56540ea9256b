"""Each closed form against quadrature of its definition, and against identities."""

import pickle

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from qrpo.errors import ConfigError
from qrpo.method.partition import log_z
from qrpo.method.quadrature import tilted_nodes
from qrpo.method.transforms import Identity, Log, Logit, NormalIcdf, Power, from_function, get_transform
from tests.support.refusals import refuses

BETAS = np.geomspace(1e-4, 10.0, 41)
POWERS = [Power(exponent=exponent) for exponent in (0.5, 1.0, 2.0, 7.0)]
CLOSED = [Identity(), Log(), NormalIcdf(), *POWERS]


def quadrature_log_z(transform, betas):
    return np.array([tilted_nodes(transform.at_logit, 1.0 / beta).log_z for beta in betas])


@pytest.mark.parametrize("transform", CLOSED, ids=repr)
def test_closed_form_equals_quadrature_from_beta_1e_4_to_10(transform):
    np.testing.assert_allclose(transform.log_z(BETAS), quadrature_log_z(transform, BETAS), rtol=2e-12)


def test_logit_equals_quadrature_and_a_beta_function_over_its_domain():
    betas = 1.0 + np.geomspace(1e-3, 9.0, 30)
    np.testing.assert_allclose(Logit().log_z(betas), quadrature_log_z(Logit(), betas), rtol=2e-11)
    betas = np.array([1.001, 1.2, 1.999, 2.0, 2.001, 5.0])
    np.testing.assert_allclose(Logit().log_z(betas), special.betaln(1 + 1 / betas, 1 - 1 / betas), rtol=1e-11)
    match = r"got 1 for the transform 'logit'.*beta > 1"
    refuses(ConfigError, match, Logit().log_z, np.array([2.0, 1.0]))
    refuses(ConfigError, "diverges", tilted_nodes, Logit().at_logit, 1.0 / 0.9)


@pytest.mark.parametrize("transform", [*CLOSED, Logit()], ids=repr)
def test_quadrature_equals_scipy_where_scipy_can(transform):
    for beta in (1.5, 4.0, 10.0):
        expected, _ = integrate.quad(
            lambda t, beta=beta: float(np.exp(transform(np.float64(t)) / beta)), 0, 1, epsabs=1e-13, limit=500
        )
        assert quadrature_log_z(transform, [beta])[0] == pytest.approx(np.log(expected), rel=1e-8)


@pytest.mark.parametrize("transform", [*CLOSED, Logit()], ids=repr)
def test_beta_log_z_keeps_full_relative_accuracy_in_float32(transform):
    betas = BETAS[transform.min_beta < BETAS].astype(np.float32)
    exact = betas.astype(np.float64) * transform.log_z(betas.astype(np.float64))
    for beta in (betas, torch.from_numpy(betas)):
        logarithm = transform.log_z(beta)
        assert logarithm.dtype == beta.dtype
        assert np.isfinite(np.asarray(beta * logarithm)).all()
        np.testing.assert_allclose(np.asarray(beta * logarithm), exact, rtol=3e-7)


def test_identity_is_exact_at_both_extremes():
    # log(beta (e^(1/beta) - 1)): 1/beta + log(beta) far below, 1/(2 beta) + 1/(24 beta^2) far above
    assert float(Identity().log_z(1e-4)) == pytest.approx(1e4 + np.log(1e-4), rel=1e-15)
    assert float(Identity().log_z(1e6)) == pytest.approx(0.5e-6 + 1e-12 / 24, rel=1e-15)
    betas = np.geomspace(0.05, 10, 200)
    np.testing.assert_allclose(Identity().log_z(betas), np.log(betas * np.expm1(1 / betas)), rtol=1e-13)
    np.testing.assert_allclose(Power(exponent=1.0).log_z(BETAS), Identity().log_z(BETAS), rtol=1e-14)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_beta_that_is_not_positive_is_refused(beta):
    refuses(ConfigError, "beta", Identity().log_z, beta)


@pytest.mark.parametrize("kind", ["identity", "log", "normal-icdf", "logit", "power"])
def test_numpy_and_torch_agree_elementwise(kind):
    transform, q = get_transform(kind), np.linspace(0.01, 0.99, 33)
    np.testing.assert_allclose(transform(torch.from_numpy(q)).numpy(), transform(q), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(transform.at_logit(special.logit(q)), transform(q), rtol=1e-10, atol=1e-12)


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
    torch.testing.assert_close(clipped(torch.tensor([[0.25, 0.8]])), torch.tensor([[0.25, 0.5]]))
    step = from_function(lambda t: (t > 0.75).astype(float))
    assert float(step.log_z(0.1)) == pytest.approx(np.log(0.75 + 0.25 * np.exp(10)), rel=1e-12)
    same, betas = from_function(lambda t: t), BETAS[BETAS >= 1e-3]
    np.testing.assert_allclose(same.log_z(betas), Identity().log_z(betas), rtol=1e-11)
    assert pickle.loads(pickle.dumps(from_function(np.sqrt)))(0.25) == 0.5  # noqa: S301


def test_a_config_can_name_a_users_function_or_transform(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from qrpo.method.transforms import Transform, from_function\n"
        "def cubed(t):\n    return t**3\n"
        "steep = from_function(lambda t: np.log(t), name='steep', open_ends=(True, False))\n"
        "class Halved(Transform):\n    def __call__(self, q):\n        return q / 2\n"
    )
    cubed = get_transform(f"{tmp_path}/mine.py:cubed")
    assert get_transform(f"{tmp_path}/mine.py:cubed") is cubed
    assert float(cubed.log_z(0.1)) == pytest.approx(float(Power(exponent=3).log_z(0.1)), rel=1e-11)
    assert get_transform(f"{tmp_path}/mine.py:steep").clamp(np.zeros(1), 4).tolist() == [0.25]
    halved = float(log_z(f"{tmp_path}/mine.py:Halved", 0.1))
    assert halved == pytest.approx(float(log_z("identity", 0.2)), rel=1e-11)


def test_a_user_function_that_quadrature_cannot_take_is_refused_not_guessed():
    plain_logit = from_function(lambda t: np.log(t / (1 - t)), open_ends=(True, True))
    assert float(plain_logit.log_z(4.0)) == pytest.approx(float(Logit().log_z(4.0)), rel=1e-9)
    refuses(ConfigError, "cannot distinguish from 0 or 1", plain_logit.log_z, 1.05)
    holed = from_function(lambda t: np.where(t > 0.5, np.nan, t))
    refuses(ConfigError, "not a finite number at quantile", holed.log_z, 1.0)


@pytest.mark.parametrize(
    ("name", "clamped"),
    [("identity", [0, 0.5, 1]), ("log", [0.25, 0.5, 1]), ("normal-icdf", [0.25, 0.5, 0.75])],
)
def test_clamping_moves_open_ends_one_reference_sample_inwards(name, clamped):
    found = get_transform(name).clamp(np.array([0.0, 0.5, 1.0], dtype=np.float32), 4)
    np.testing.assert_array_equal(found, np.float32(clamped))
    ends = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    per_prompt = get_transform("normal-icdf").clamp(ends, torch.tensor([[4], [1]]))
    torch.testing.assert_close(per_prompt, torch.tensor([[0.25, 0.75], [0.5, 0.5]]))


def test_a_scale_divides_beta_and_is_asked_for():
    scale, finite = np.array([[0.5], [2.0], [0.0]]), {"partition": "finite", "num_ref": 5}
    np.testing.assert_allclose(log_z("scaled-normal-icdf", 0.1, scale=scale), scale**2 / (2 * 0.1**2))
    found = log_z("scaled-normal-icdf", np.float64(0.1), scale=scale, **finite)[:2, 0]
    np.testing.assert_allclose(found, [log_z("normal-icdf", 0.1 / s, **finite) for s in (0.5, 2.0)])
    for partition in ({}, finite):
        refuses(ConfigError, "one scale per prompt", log_z, "scaled-normal-icdf", 0.1, **partition)


def test_an_unknown_name_lists_the_known_ones():
    refuses(ConfigError, "identity, log, normal-icdf", get_transform, "sigmoid")
    refuses(ConfigError, "exponent", Power, exponent=0)


def test_a_name_may_have_numbers():
    half = get_transform("power(exponent=0.5)")
    assert float(half(0.25)) == 0.5
    assert float(half.log_z(0.1)) == float(Power(exponent=0.5).log_z(0.1))
    clamped = get_transform("normal-icdf(edge=2)").clamp(np.array([0.0, 0.5, 1.0]), 8)
    assert clamped.tolist() == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "name",
    [
        "power(exponent=0)",
        "power(0.5)",
        "power(exponent=x)",
        "power(exponent=nan)",
        "power(exponent=1, exponent=2)",
        "log(exponent=2)",
        "log(edge=-1)",
    ],
)
def test_numbers_that_a_transform_does_not_have_are_refused(name):
    with pytest.raises(ConfigError, match="transform"):
        get_transform(name)
