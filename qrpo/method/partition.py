"""The partition function Z of the quantile-reward objective, in three exact forms.

The optimum of E[f(q)] - beta KL(policy || reference) is pi*(y|x) = ref(y|x) exp(f(q)/beta)/Z with
Z = E_ref[exp(f(q)/beta)]. The distribution of q under the reference decides Z:

`continuous` (the paper): rewards have no ties and q is the true quantile, so q is uniform on (0, 1)
    and Z = integral_0^1 exp(f(t)/beta) dt. Right if n is large relative to 1/beta, and with
    `ties="randomized"`, whose quantiles are exactly uniform for every n and every reward
    distribution.

`finite`: rewards have no ties, and q is estimated from n reference samples. A reference completion
    and its n samples are n + 1 exchangeable draws, so q is uniform on {0..n}/n and Z = 1/(n+1)
    sum_{k=0}^n exp(f(k/n)/beta). If the completion counts among its own n references
    (`self_included`), Z = 1/n sum_{k=1}^n exp(f(k/n)/beta); leave-one-out is the first case with
    n - 1. Quantiles at an open end of f are clamped as in training, inside the sum.
    Exact for the mean of exp(f(q)/beta) over completions and over draws of the references.

    Use it if f is infinite at an end and therefore clamped: for `normal-icdf` at beta = 0.5 the
    continuous log Z is 2.00 for any n, `finite` 1.24 at n = 10 and 1.73 at n = 50, and a policy can
    fit 1.06 to 1.16 and 1.64 to 1.69. For `identity` prefer `continuous` (7.70 at beta = 0.1):
    E[q_n] = q, and even a policy that memorizes each prompt's noise has log Z of 7.73 on average at
    n = 50 (7.90 at n = 10), by Jensen's inequality below the `finite` 7.78 (8.06). Measured in
    benchmarks/README.md.

`empirical`: rewards are discrete (pass rates, grades), so q takes few values with unequal
    probabilities, and Z = 1/n sum_i exp(f(q(s_i))/beta) over the reference samples s_i, q(s_i) =
    P_n(s <= s_i). With true probabilities p_j of the reward's values in place of counts it is
    exact: Z = sum_j p_j exp(f(q_j)/beta).

All sums are log-mean-exps in float64 and are returned in the caller's dtype.
"""

from typing import Literal

import numpy as np

from qrpo.errors import ConfigError, DataError
from qrpo.method.arrays import Array, Float64, is_torch, on_float64, to_float64
from qrpo.method.transforms import Transform, get_transform

Partition = Literal["continuous", "finite", "empirical"]


def log_z(
    transform: str | Transform,
    beta: Array,
    *,
    partition: Partition = "continuous",
    num_ref: Array | None = None,
    self_included: bool = False,
    ref_quantiles: Array | None = None,
    ref_weights: Array | None = None,
    scale: Array | None = None,
) -> Array:
    """log Z, elementwise on beta (a number, a NumPy array or a torch tensor), in beta's type.

    `num_ref`: for `finite`, the number of reference samples that each quantile was estimated from
    (for leave-one-out, those left); broadcasts against beta. For `empirical` it sets the clamp if f
    is infinite at an end.
    `self_included`: for `finite`, whether every quantile counts the completion among its own
    references.
    `ref_quantiles`: for `empirical`, (..., N) quantiles of the reference samples, NaN for missing
    ones; its leading axes broadcast against beta's (usually (B, 1, N) against (B, K)).
    `ref_weights`: the same shape, the count or probability of each quantile; the default is 1.
    `scale`: for scale * f, whose log Z is that of f at beta / scale; 0 where the scale is 0.
    Raises ConfigError for an unknown partition or a missing argument.
    """
    resolved = get_transform(transform)
    if partition not in ("continuous", "finite", "empirical"):
        raise ConfigError(f"partition: got {partition!r}, expected continuous, finite or empirical")
    if partition == "finite" and num_ref is None:
        raise ConfigError("partition finite: num_ref, the number of reference samples, is missing")
    if partition == "empirical" and ref_quantiles is None:
        raise ConfigError(
            "partition empirical: ref_quantiles, the quantiles of the reference samples, is missing"
        )
    if resolved.needs_scale and scale is None:
        raise ConfigError(
            f"transform {resolved.name!r} needs one scale per prompt: pass scale=reference_scale(ref_std, mean_ref_std), "
            "or use 'normal-icdf'"
        )
    if scale is not None:
        with np.errstate(divide="ignore"):  # all reference rewards equal: beta / 0 = inf, Z = 1
            beta = beta / (scale if is_torch(scale) else np.asarray(scale))
    if partition == "continuous":
        return resolved.log_z(beta)
    if partition == "finite":

        def finite(betas: Float64, samples: Float64) -> Float64:
            return _finite_log_z(resolved, betas, samples, self_included)

        return on_float64(finite, beta, num_ref)

    def empirical(betas: Float64, quantiles: Float64, weights: Float64) -> Float64:
        present = np.where(np.isnan(quantiles), 0.0, weights)
        samples = present.sum(axis=-1, keepdims=True) if num_ref is None else to_float64(num_ref)[..., None]
        if any(resolved.open_ends) and ref_weights is not None and np.any(samples < 1.5):
            raise ConfigError(
                f"partition empirical: transform {resolved.name!r} clamps quantiles, which needs num_ref"
            )
        levels = to_float64(resolved(resolved.clamp(quantiles, samples)))
        return _log_mean_exp(levels / _positive(betas)[..., None], present)

    return on_float64(empirical, beta, ref_quantiles, 1.0 if ref_weights is None else ref_weights)


def quantile_grid(num_ref: int, *, self_included: bool = False) -> Float64:
    """The values, equally likely under the reference, of a quantile estimated from `num_ref`
    samples without ties."""
    return np.arange(1 if self_included else 0, num_ref + 1) / num_ref


def _finite_log_z(transform: Transform, beta: Float64, num_ref: Float64, self_included: bool) -> Float64:
    betas, samples = np.broadcast_arrays(_positive(beta), num_ref)
    result = np.empty(betas.shape)
    for count in np.unique(samples):  # one grid per distinct number of references; there are few
        if count < 1 or count != np.floor(count):
            raise DataError(
                f"partition finite: num_ref must be a whole number of at least 1, got {count:g}; "
                "a leave-one-out quantile needs two reference samples"
            )
        chosen = samples == count
        grid = quantile_grid(int(count), self_included=self_included)
        levels = to_float64(transform(transform.clamp(grid, count)))
        distinct, inverse = np.unique(betas[chosen], return_inverse=True)
        result[chosen] = _log_mean_exp(levels / distinct[:, None])[inverse]
    return result


def _log_mean_exp(exponents: Float64, weights: Float64 | float = 1.0) -> Float64:
    """log of the weighted mean of exp over the last axis; accurate also for exponents near 0."""
    weights = np.broadcast_to(weights, exponents.shape)
    total = weights.sum(axis=-1)
    if not np.all(total > 0):
        raise DataError("partition empirical: a prompt has no reference quantiles")
    filled = np.where(weights > 0, exponents, -np.inf)
    top = filled.max(axis=-1)
    with np.errstate(invalid="ignore"):
        large = top + np.log((weights * np.exp(filled - top[..., None])).sum(axis=-1) / total)
    few = np.where(weights > 0, exponents, 0.0)
    near_zero = np.abs(few).max(axis=-1) < 0.5
    small = np.log1p(np.maximum((weights * np.expm1(np.clip(few, -1.0, 1.0))).sum(axis=-1) / total, -0.9))
    return np.where(near_zero, small, large)


def _positive(beta: Float64) -> Float64:
    """beta, which need only be above 0 for a finite sum, also if the continuous Z needs more."""
    if not np.all(beta > 0):
        raise ConfigError(f"beta: must be above 0, got {float(np.min(beta)):g}")
    return beta
