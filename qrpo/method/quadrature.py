"""Integrals over the reference's quantiles, in the log domain, for any transform and any beta.

The integrand is exp(f(t)/beta) over t in (0, 1). At beta = 1e-4 it spans e^10000, and for an
unbounded transform its mass is at quantiles such as 1 - 10^(-2e7), which float64 cannot represent.
So the variable is the logit x = log(t/(1-t)), where such a quantile is x = 5e7:

    Z = integral_R exp( f(sigmoid(x))/beta + log sigmoid(x) + log sigmoid(-x) ) dx

Panels of Gauss-Legendre nodes are split until splitting changes nothing. Every panel stores the
logarithm of its integral, so nothing overflows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qrpo.errors import ConfigError
from qrpo.method.arrays import Float64

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_FARTHEST_LOGIT = 1e13
_MAX_PANELS = 200_000


@dataclass(frozen=True)
class TiltedNodes:
    """A quadrature rule for expectations under the optimum's quantile density exp(f(t)/beta)/Z on
    (0, 1).

    `logit`: nodes, the logits of quantiles, ascending. `weight`: their weights, which sum to 1.
    `log_z`: log Z.
    """

    logit: Float64
    weight: Float64
    log_z: float

    def expectation(self, values: Float64) -> float:
        """The mean of a function given by its values at the nodes (ignored if its weight is 0)."""
        carried = self.weight > 0
        return float(np.dot(self.weight[carried], values[carried]))


def tilted_nodes(
    at_logit: Callable[[Float64], Float64],
    inverse_beta: float,
    tolerance: float = 1e-14,
    breaks: Sequence[float] = (),
) -> TiltedNodes:
    """Nodes, weights and log Z of exp(inverse_beta * f) over uniform quantiles; `at_logit(x)` is
    f(sigmoid(x)).

    `breaks`: logits at which panels end, so that sums of weights between them are integrals between
    them. Raises ConfigError where the integral diverges, is not a number, or does not converge.
    """

    def panel(lo: Float64, hi: Float64) -> tuple[Float64, Float64]:
        """Nodes (M, G) and the log of each node's share of the integral (M, G)."""
        half = 0.5 * (hi - lo)
        x = lo[:, None] + half[:, None] * (1.0 + _NODES)
        with np.errstate(invalid="ignore", over="ignore"):
            tilt = inverse_beta * at_logit(x) if inverse_beta else np.zeros_like(x)
        if np.isnan(tilt).any() or (tilt == np.inf).any():
            raise ConfigError(
                f"the transform is not a finite number at quantile {_quantile(x, tilt)!r}; it must be finite inside (0, 1)"
            )
        # log sigmoid(x) + log sigmoid(-x), without cancellation at either end
        log_density = -np.abs(x) - 2.0 * np.log1p(np.exp(-np.abs(x)))
        return x, tilt + log_density + np.log(half[:, None] * _WEIGHTS)

    side = np.sinh(np.linspace(0.0, np.arcsinh(_FARTHEST_LOGIT), 80))
    edges = np.unique(np.concatenate([-side[:0:-1], side, breaks]))
    lo, hi = edges[:-1], edges[1:]
    whole = _log_sum(panel(lo, hi)[1])
    done_x: list[Float64] = []
    done_share: list[Float64] = []
    done_total = -np.inf
    panels = 0
    while lo.size:
        panels += 2 * lo.size
        if panels > _MAX_PANELS:
            raise ConfigError(
                f"the partition function of the transform at 1/beta = {inverse_beta:g} does not converge after "
                f"{panels} panels; the transform is too rough for quadrature: use partition='finite'"
            )
        middle = 0.5 * (lo + hi)
        x, share = panel(np.concatenate([lo, middle]), np.concatenate([middle, hi]))
        halves = _log_sum(share)
        both = np.logaddexp(halves[: lo.size], halves[lo.size :])
        total = np.logaddexp(done_total, _log_sum(both[None])[0])
        peak = float(np.max(share, where=np.isfinite(share), initial=-np.inf))
        # near the peak the exponents have rounding errors of eps * |exponent|
        allowed = max(tolerance, 8 * np.finfo(np.float64).eps * abs(peak) if np.isfinite(peak) else 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            change = np.abs(np.exp(whole - total) - np.exp(both - total))
        settled = (change <= allowed) | (middle <= lo) | (middle >= hi)
        twice = np.concatenate([settled, settled])
        done_x.append(x[twice].ravel())
        done_share.append(share[twice].ravel())
        done_total = np.logaddexp(done_total, _log_sum(share[twice].reshape(1, -1))[0])
        pending = ~settled
        lo, hi = (
            np.concatenate([lo[pending], middle[pending]]),
            np.concatenate([middle[pending], hi[pending]]),
        )
        whole = halves[~twice]
    x_all, share_all = np.concatenate(done_x), np.concatenate(done_share)
    order = np.argsort(x_all)
    log_z = float(_log_sum(share_all[None])[0])
    weight = np.exp(share_all[order] - log_z)
    nodes = TiltedNodes(x_all[order], weight / weight.sum(), log_z)
    if nodes.weight[np.abs(nodes.logit) > 0.1 * _FARTHEST_LOGIT].sum() > 1e-12:
        raise ConfigError(
            f"the partition function of the transform diverges at 1/beta = {inverse_beta:g}; use a larger beta"
        )
    return nodes


def _log_sum(log_terms: Float64) -> Float64:
    """log of the sum of exp over the last axis; -inf for none."""
    if log_terms.shape[-1] == 0:
        return np.full(log_terms.shape[:-1], -np.inf)
    top = np.max(log_terms, axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(log_terms - top).sum(axis=-1)) + top[..., 0])


def _quantile(x: Float64, tilt: Float64) -> float:
    bad = x[np.isnan(tilt) | (tilt == np.inf)].ravel()[0]
    return float(1.0 / (1.0 + np.exp(-np.clip(bad, -700, 700))))
