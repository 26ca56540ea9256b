"""The exact optimum of E[f(q)] - beta KL(policy || reference), in terms of quantile rewards.

pi* depends on a completion only through its quantile t under the reference, where t is uniform:

    density     p(t) = exp(f(t)/beta)/Z                        of quantile rewards under pi*
    win rate    E_p[t]                                          = P(pi* beats the reference), ties
                count half
    KL          E_p[f]/beta - log Z                             = KL(pi* || reference), nats
    gain        beta log Z - E_uniform[f]                       increase of the objective

so one quadrature rule (`qrpo.method.quadrature`) computes all of it, for any transform. One that is
scaled per prompt has the scale of the average prompt, 1.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from qrpo.errors import DataError
from qrpo.method.arrays import Float64, to_float64
from qrpo.method.quadrature import TiltedNodes, tilted_nodes
from qrpo.method.transforms import Transform, get_transform


@dataclass(frozen=True)
class Optimum:
    """The exact optimum pi* of E[f(q)] - beta KL(policy || reference)."""

    log_z: float
    """log of the continuous partition function."""
    win_rate: float
    """Expected quantile reward: the probability of a higher reward than the reference's, in [0,
    1]."""
    kl: float
    """KL(pi* || reference) per completion, nats."""
    transformed_reward: float
    """E[f(q)]."""
    gain: float
    """Objective minus the reference's, in units of f."""


def optimum(transform: str | Transform, beta: float) -> Optimum:
    """The numbers of the exact optimum, by quadrature (1e-10 relative or better)."""
    resolved = get_transform(transform)
    nodes = resolved.nodes(beta)
    reference = reference_nodes(resolved)
    transformed = nodes.expectation(resolved.at_logit(nodes.logit))
    return Optimum(
        log_z=nodes.log_z,
        win_rate=nodes.expectation(_sigmoid(nodes.logit)),
        kl=max(0.0, transformed / beta - nodes.log_z),
        transformed_reward=transformed,
        gain=beta * nodes.log_z - reference.expectation(resolved.at_logit(reference.logit)),
    )


def optimum_density(transform: str | Transform, beta: float, quantile: ArrayLike) -> Float64:
    """p(t) = exp(f(t)/beta)/Z at quantiles in (0, 1); the reference's density is 1."""
    resolved = get_transform(transform)
    transformed = to_float64(resolved(np.asarray(quantile, dtype=np.float64)))
    return np.asarray(np.exp(transformed / beta - resolved.log_z(beta)))


def optimum_cdf(transform: str | Transform, beta: float, quantile: ArrayLike) -> Float64:
    """The optimum's probability of a quantile reward of at most `quantile`."""
    resolved = get_transform(transform)
    points = np.asarray(quantile, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(points) - np.log1p(-points)
    inner = logits[np.isfinite(logits)]
    nodes = tilted_nodes(resolved.at_logit, 1.0 / beta, 1e-12, breaks=inner.ravel().tolist())
    below = np.concatenate([[0.0], np.cumsum(nodes.weight)])
    return np.asarray(np.minimum(below[np.searchsorted(nodes.logit, logits)], 1.0))


def expected_reward(
    transform: str | Transform,
    beta: float,
    ref_rewards: ArrayLike,
    *,
    ref_offsets: ArrayLike | None = None,
) -> Float64:
    """(P,) expected reward of the optimum on each prompt, given its reference rewards: (P, N), or
    flat with offsets.

    The i-th smallest of n rewards represents the quantiles between (i - 1)/n and i/n and gets the
    optimum's probability of them.
    """
    resolved = get_transform(transform)
    values = np.asarray(ref_rewards, dtype=np.float64)
    if ref_offsets is None and values.ndim != 2:
        raise DataError(
            f"ref_rewards: got shape {values.shape}, expected (prompts, references), or flat with ref_offsets"
        )
    bounds = np.arange(len(values) + 1) * values.shape[-1] if ref_offsets is None else np.asarray(ref_offsets)
    flat, lengths = values.reshape(-1), np.diff(bounds)
    result = np.full(len(lengths), np.nan)
    for length in np.unique(lengths[lengths > 0]):
        prompts = np.flatnonzero(lengths == length)
        ordered = np.sort(flat[bounds[prompts][:, None] + np.arange(length)], axis=1)
        weights = np.diff(optimum_cdf(resolved, beta, np.arange(length + 1) / length))
        result[prompts] = (ordered * weights).sum(axis=1)
    return result


@lru_cache(maxsize=64)
def reference_nodes(transform: Transform) -> TiltedNodes:
    """A quadrature rule for expectations under the reference, fine enough for n of 1000."""
    return tilted_nodes(transform.at_logit, 0.0, breaks=tuple(np.linspace(-40.0, 40.0, 401)))


def _sigmoid(x: Float64) -> Float64:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -700.0, 700.0)))
