"""Closed forms of log Z that neither overflow nor cancel, in float64.

Z = integral_0^1 exp(u f(t)) dt with u = 1/beta. The naive formulas fail at both ends: log((e^u - 1)/u) overflows for u above
709 (above 88 in float32) and loses every digit for u near 0, where log Z itself tends to 0. Each function here joins two
forms, one for small u whose terms are all positive, one for large u whose exponent is taken out. Elementwise; no argument
is checked: `qrpo.method.transforms` does that.
"""

import numpy as np

from qrpo.method.arrays import Float64

__all__ = ["identity_log_z", "logit_log_z", "power_log_z"]


def identity_log_z(u: Float64) -> Float64:
    """log((e^u - 1)/u), for f(t) = t (arXiv 2507.08068)."""
    # small u: u/2 + log(sinh(h)/h) with h = u/2 and sinh(h)/h - 1 = h^2/6 (1 + h^2/20 (1 + h^2/42 (...)))
    h = np.minimum(u, 2.0) / 2.0
    square = h * h
    series = np.ones_like(h)
    for k in range(10, 0, -1):
        series = 1.0 + square / ((2 * k + 2) * (2 * k + 3)) * series
    small = h + np.log1p(square / 6.0 * series)
    # large u: u - log u + log(1 - e^-u); the last term is what the research code drops
    u = np.maximum(u, 2.0)
    return np.where(h < 1.0, small, u + np.log(-np.expm1(-u) / u))


def logit_log_z(beta: Float64) -> Float64:
    """log B(1 + u, 1 - u) = log(pi u/sin(pi u)), for f(t) = log(t/(1 - t)) and beta = 1/u above 1."""
    from scipy.special import zeta

    # u <= 1/2: sum over k of zeta(2k) u^2k / k
    square = np.minimum(1.0 / beta, 0.5) ** 2
    k = np.arange(1, 31)
    small = np.zeros_like(square)
    for coefficient in (zeta(2.0 * k) / k)[::-1]:
        small = square * (coefficient + small)
    # above: sin(pi u) = sin(pi (beta - 1)/beta), exact near u = 1, where Z diverges
    near = np.where(beta < 2.0, beta, 1.5)
    large = -np.log(np.sin(np.pi * ((near - 1.0) / near)) * near / np.pi)
    return np.where(beta < 2.0, large, small)


def power_log_z(u: Float64, exponent: float) -> Float64:
    """log 1F1(a; a + 1; u) with a = 1/exponent, for f(t) = t^exponent."""
    from scipy.special import hyp1f1

    a = 1.0 / exponent
    # u <= 1: Z - 1 = sum over k of a/(a + k) u^k/k!
    few = np.minimum(u, 1.0)
    excess, term = np.zeros_like(few), np.ones_like(few)
    for k in range(1, 22):
        term = term * few / k
        excess = excess + a / (a + k) * term
    # above: Kummer's transformation, e^u 1F1(1; a + 1; -u)
    many = np.maximum(u, 1.0)
    return np.where(u <= 1.0, np.log1p(excess), many + np.log(hyp1f1(1.0, a + 1.0, -many)))
