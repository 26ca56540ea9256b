"""What the optimum gives, and what n reference samples are worth, computed before any training.

`qrpo.method.optimum` has the exact optimum. With n reference samples instead of the true quantile:

    noise       E[(f(q_n) - f(q))^2], q_n = k/n with k binomial(n, q), q uniform: 1/(6n) for the
                identity
    SNR         Var f(q) / noise: n/2 for the identity. This is the paper's pre-computation scaling.
    attained    the objective of the policy that fits each prompt's noisy f(q_n), as one that
                memorises does; generalising over prompts smooths the noise. Its loss relative to
                pi* is beta KL(attained || pi*). A pointwise loss loses a little more, because it
                has one Z for all prompts (benchmarks/optimum.py).

`enough_references` is the smallest n that attains a given fraction of the gain. `qrpo theory` shows
`summary`, the tables and the plot.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qrpo.errors import ConfigError
from qrpo.method.arrays import Float64, to_float64
from qrpo.method.optimum import (
    optimum,
    optimum_density,
    reference_nodes,
)
from qrpo.method.partition import log_z
from qrpo.method.transforms import Transform, get_transform

NUM_REFS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Noise:
    """Accuracy of f(q) estimated from n reference samples."""

    num_ref: int
    signal: float
    """Standard deviation of f(q) over the reference's completions."""
    noise: float
    """Root mean squared error of f(q_n)."""
    snr: float
    """Signal-to-noise ratio, of variances; n/2 for the identity."""
    pairs_told_apart: float
    """Probability that two reference completions of a prompt get different quantiles: n/(n + 2)."""


@dataclass(frozen=True)
class Attained:
    """What a policy attains that fits each prompt's quantiles estimated from n reference samples,
    including their noise."""

    num_ref: int
    win_rate: float
    kl: float
    gain: float
    share: float
    """`gain` divided by the optimum's."""


def estimate_noise(transform: str | Transform, num_ref: int) -> Noise:
    """Signal and noise of f(q_n), q_n estimated from `num_ref` samples, clamped as in training."""
    resolved, n = get_transform(transform), _whole(num_ref)
    nodes = reference_nodes(resolved)
    f = resolved.at_logit(nodes.logit)
    k = np.arange(n + 1)
    estimate = to_float64(resolved(resolved.clamp(k / n, n)))
    # the probability of k among n references at or below quantile t, times n + 1: q given k is
    # Beta(k + 1, n - k + 1)
    from scipy.special import gammaln, log_expit

    log_choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    squared = np.zeros_like(f)
    for count in k:  # one term at a time: (n + 1) x nodes would be large for n = 1000
        probability = np.exp(
            log_choose[count] + count * log_expit(nodes.logit) + (n - count) * log_expit(-nodes.logit)
        )
        squared += np.where(probability > 0, probability * (estimate[count] - f) ** 2, 0.0)
    variance = nodes.expectation(f * f) - nodes.expectation(f) ** 2
    noise = nodes.expectation(squared)
    return Noise(
        num_ref=n,
        signal=float(np.sqrt(variance)),
        noise=float(np.sqrt(noise)),
        snr=variance / noise,
        pairs_told_apart=n / (n + 2),
    )


def attained(transform: str | Transform, beta: float, num_ref: int) -> Attained:
    """What fitting quantiles from `num_ref` samples attains: a mean over seeded draws of the
    references, to about 1e-3.

    The true quantiles of the n references divide (0, 1) into n + 1 spacings D_k; the policy gives
    the k-th the weight D_k exp(f(k/n)/beta), normalised per prompt.
    """
    resolved, n = get_transform(transform), _whole(num_ref)
    best = optimum(resolved, beta)
    draws = max(200, min(4000, 200_000 // (n + 1)))
    cuts = np.sort(np.random.default_rng(0).random((draws, n)), axis=1)
    edges = np.concatenate([np.zeros((draws, 1)), cuts, np.ones((draws, 1))], axis=1)
    width = np.diff(edges, axis=1)
    levels = to_float64(resolved(resolved.clamp(np.arange(n + 1) / n, n))) / beta
    scores = np.log(np.maximum(width, np.finfo(float).tiny)) + levels
    scores -= scores.max(axis=1, keepdims=True)
    weight = np.exp(scores)
    weight /= weight.sum(axis=1, keepdims=True)
    log_partition = np.log((width * np.exp(levels - levels.max())).sum(axis=1)) + levels.max()
    kl = (weight * levels).sum(axis=1) - log_partition
    value = (weight * _mean_over_intervals(resolved, edges)).sum(axis=1)
    reference = best.transformed_reward - beta * best.kl - best.gain  # E_uniform[f]
    gain = float(np.mean(value - beta * kl)) - reference
    return Attained(
        num_ref=n,
        win_rate=float(np.mean((weight * 0.5 * (edges[:, 1:] + edges[:, :-1])).sum(axis=1))),
        kl=float(np.mean(kl)),
        gain=gain,
        share=gain / best.gain,
    )


def enough_references(
    transform: str | Transform, beta: float, *, share: float = 0.95, candidates: Sequence[int] = NUM_REFS
) -> int | None:
    """The fewest of `candidates` reference samples that attain `share` of the gain, or None."""
    return next((n for n in sorted(candidates) if attained(transform, beta, n).share >= share), None)


def summary(transform: str | Transform, beta: float, num_ref: int | None = None) -> dict[str, Any]:
    """All of the above for one setting, as a flat dict of numbers and names for JSON.

    Keys: `transform`, `beta`, `partition`, `num_ref`, the fields of Optimum, `log_z_used` (under
    `partition`), `beta_log_z`; with `num_ref` also `attained_*`, `snr`, `noise`, `log_ratio_noise`
    (nats) and `enough_references`.
    """
    used = float(log_z(transform, beta, scale=1.0))
    result: dict[str, Any] = {
        "transform": _name(transform),
        "beta": beta,
        "partition": "continuous",
        "num_ref": num_ref,
        **asdict(optimum(transform, beta)),
        "log_z_used": used,
        "beta_log_z": beta * used,
    }
    if num_ref is not None:
        noise, got = estimate_noise(transform, num_ref), attained(transform, beta, num_ref)
        result |= {
            "attained_win_rate": got.win_rate,
            "attained_kl": got.kl,
            "attained_share": got.share,
            "snr": noise.snr,
            "noise": noise.noise,
            "log_ratio_noise": noise.noise / beta,
            "enough_references": enough_references(transform, beta),
        }
    return result


def theory_table(
    transform: str | Transform, beta: float, num_refs: Sequence[int] = NUM_REFS
) -> list[dict[str, float | int]]:
    """One row per number of reference samples: what it attains, its noise, and the error of the
    continuous log Z."""
    resolved = get_transform(transform)
    rows: list[dict[str, float | int]] = []
    for n in num_refs:
        noise, got = estimate_noise(resolved, n), attained(resolved, beta, n)
        finite = float(log_z(resolved, beta, partition="finite", num_ref=n, scale=1.0))
        rows.append(
            {
                "num_ref": n,
                "win_rate": got.win_rate,
                "kl": got.kl,
                "gain_share": got.share,
                "snr": noise.snr,
                "log_ratio_noise": noise.noise / beta,
                "pairs_told_apart": noise.pairs_told_apart,
                "log_z_finite": finite,
                "log_z_error": float(resolved.log_z(beta)) - finite,
            }
        )
    return rows


def beta_table(transform: str | Transform, betas: Sequence[float]) -> list[dict[str, float]]:
    """One row per beta with the exact optimum's numbers, to choose a beta."""
    return [{"beta": beta, **asdict(optimum(transform, beta))} for beta in betas]


def plot_theory(
    path: str | Path,
    transform: str | Transform,
    beta: float,
    num_ref: int | None = None,
    *,
    num_refs: Sequence[int] = NUM_REFS,
) -> None:
    """Four plots in one file (its suffix is the format): density, win rate and KL, gain, SNR."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    resolved, best = get_transform(transform), optimum(transform, beta)
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"QRPO optimum: transform {_name(transform)}, beta {beta:g}")
    (density, frontier), (share, snr) = figure.subplots(2, 2)

    t = np.linspace(0.001, 0.999, 999)
    density.plot(t, optimum_density(resolved, beta, t), label="optimum")
    density.axhline(1.0, color="grey", linestyle=":", label="reference")
    density.axvline(best.win_rate, color="C1", linestyle="--", label=f"win rate {best.win_rate:.3f}")
    density.set(xlabel="quantile reward", ylabel="density", title=f"KL {best.kl:.3g} nats")
    density.legend()

    betas = [b for b in beta * np.geomspace(0.03, 30, 31) if b > resolved.min_beta]
    curve = beta_table(resolved, betas)
    frontier.plot([row["kl"] for row in curve], [row["win_rate"] for row in curve])
    frontier.plot(best.kl, best.win_rate, "o", color="C1", label=f"beta {beta:g}")
    frontier.set(xscale="log", xlabel="KL to the reference, nats", ylabel="win rate", title="over beta")
    frontier.legend()

    rows = theory_table(resolved, beta, num_refs)
    counts = [row["num_ref"] for row in rows]
    share.plot(counts, [row["gain_share"] for row in rows], "o-")
    share.axhline(0.95, color="grey", linestyle=":")
    share.set(
        xscale="log",
        xlabel="reference samples",
        ylabel="fraction of the gain",
        title="attained by fitting n samples",
    )
    snr.plot(counts, [row["snr"] for row in rows], "o-")
    snr.set(xscale="log", yscale="log", xlabel="reference samples", ylabel="signal-to-noise", title="of f(q)")
    if num_ref is not None:
        for axes in (share, snr):
            axes.axvline(num_ref, color="C1", linestyle="--", label=f"n = {num_ref}")
            axes.legend()
    figure.savefig(path, dpi=120)


def _name(transform: str | Transform) -> str:
    return transform if isinstance(transform, str) else transform.name


def _whole(num_ref: int) -> int:
    if num_ref < 1 or num_ref != int(num_ref):
        raise ConfigError(f"num_ref: got {num_ref!r}, expected a whole number of at least 1")
    return int(num_ref)


def _mean_over_intervals(transform: Transform, edges: Float64) -> Float64:
    """The mean of f over each interval of (R, n + 2) edges from 0 to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    nodes, weights = 0.5 * (nodes + 1.0), 0.5 * weights
    lo, width = edges[:, :-1, None], np.diff(edges, axis=1)[:, :, None]
    inside = np.clip(lo + width * nodes, np.finfo(float).tiny, 1.0 - np.finfo(float).epsneg)
    means = to_float64(transform(inside)) @ weights
    # f may be infinite at 0 and 1, like a logarithm: t = width v^4 removes the singularity
    v, w = np.polynomial.legendre.leggauss(24)
    v, w = 0.5 * (v + 1.0), 0.5 * w
    share, jacobian = v**4, 4.0 * w * v**3
    means[:, 0] = (
        to_float64(transform(np.maximum(edges[:, 1, None] * share, np.finfo(float).tiny))) @ jacobian
    )
    top = 1.0 - (1.0 - edges[:, -2, None]) * share
    means[:, -1] = to_float64(transform(np.minimum(top, 1.0 - np.finfo(float).epsneg))) @ jacobian
    return means
