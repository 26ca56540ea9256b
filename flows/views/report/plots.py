"""The report's pictures: matplotlib figures as inline SVG whose colours are the page's own, so that they follow light and dark."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from flows.views.report.content import Content
from qrpo.evaluation.statistics import Floats
from qrpo.method.theory import attained, beta_table, estimate_noise, expected_reward, optimum_density
from qrpo.method.transforms import get_transform

__all__ = ["Plot", "draw"]

# stand-ins in the drawing for the page's CSS variables
_INK, _FAINT, _POLICY, _REFERENCE, _THEORY = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    _INK: "currentColor",
    _FAINT: "var(--line)",
    _POLICY: "var(--policy)",
    _REFERENCE: "var(--reference)",
    _THEORY: "var(--theory)",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "grid.linewidth": 0.6,
    "grid.color": _FAINT,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
}
_POINTS = 1_500  # of a scatter plot: more only makes a heavier page


@dataclass(frozen=True)
class Plot:
    """One picture with its heading and what it shows."""

    title: str
    text: str
    svg: Markup


def draw(content: Content) -> list[Plot]:
    """The pictures that the run has data for, in the order of the page."""
    plots = []
    for name, (title, text, figure) in _FIGURES.items():
        with mpl.rc_context(_STYLE):
            drawing = Figure(figsize=(4.6, 3.2), layout="constrained")
            if figure(drawing.subplots(), content):
                plots.append(Plot(title, text, _svg(drawing, name, title)))
    return plots


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an SVG element with ids of its own, page colours, a label, and no metadata."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1
    )
    svg = svg.replace("xlink:href=", "href=")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


def _values(content: Content, model: str, column: str) -> Floats:
    assert content.evaluation is not None
    return content.evaluation.filter(pl.col("model") == model)[column].to_numpy().astype(float)


def _rewards(axes: Any, content: Content) -> bool:
    if content.evaluation is None:
        if not content.ref_rewards:
            return False
        series = {"reference": np.concatenate(content.ref_rewards)}
    else:
        series = {name: _values(content, name, "reward") for name in ("reference", "policy")}
    everything = np.concatenate(list(series.values()))
    bins = np.histogram_bin_edges(everything, bins=min(40, max(10, len(np.unique(everything)))))
    for name, values in series.items():
        colour = _POLICY if name == "policy" else _REFERENCE
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=weights, color=colour, alpha=0.35)
        axes.hist(values, bins, weights=weights, color=colour, histtype="step", linewidth=1.4, label=name)
        axes.axvline(values.mean(), color=colour, linestyle="--", linewidth=1.2)
    axes.set(xlabel="reward (dashed: means)", ylabel="share of completions")
    axes.legend(loc="upper left")
    return True


def _density(axes: Any, content: Content) -> bool:
    if content.evaluation is None:
        return False
    bins = np.linspace(0, 1, 21)
    for name, colour in (("reference", _REFERENCE), ("policy", _POLICY)):
        axes.hist(
            _values(content, name, "quantile_reward"),
            bins,
            density=True,
            color=colour,
            alpha=0.35,
            label=name,
        )
    if content.config.policy.loss == "qrpo":
        settings = content.config.policy
        t = np.linspace(0.002, 0.998, 400)
        axes.plot(
            t,
            optimum_density(settings.transform, settings.beta, t),
            color=_THEORY,
            label=f"optimum, beta {settings.beta:g}",
        )
    axes.axhline(1.0, color=_INK, linestyle=":", linewidth=1)
    axes.set(xlabel="quantile reward", ylabel="density", xlim=(0, 1))
    axes.legend(loc="upper left")
    return True


def _curve(column: str, label: str, more: tuple[str, ...] = ()) -> Callable[[Any, Content], bool]:
    def figure(axes: Any, content: Content) -> bool:
        if content.metrics is None or column not in content.metrics.columns:
            return False
        shown = [name for name in (column, *more) if name in content.metrics.columns]
        for name, colour in zip(shown, (_POLICY, _THEORY), strict=False):
            rows = content.metrics.select("step", name).drop_nulls()
            axes.plot(rows["step"], rows[name], color=colour, alpha=0.3, linewidth=1)
            smooth = rows[name].ewm_mean(span=max(2.0, len(rows) / 15))
            axes.plot(rows["step"], smooth, color=colour, label=name)
        axes.set(xlabel="step", ylabel=label)
        if len(shown) > 1:
            axes.legend()
        return True

    return figure


def _length(axes: Any, content: Content) -> bool:
    if content.evaluation is None:
        return False
    rng = np.random.default_rng(0)
    for name, colour in (("reference", _REFERENCE), ("policy", _POLICY)):
        length, reward = _values(content, name, "length"), _values(content, name, "reward")
        some = rng.permutation(len(length))[:_POINTS]
        jitter = rng.uniform(-0.25, 0.25, len(some))
        axes.scatter(length[some] + jitter, reward[some], s=5, color=colour, alpha=0.25, linewidths=0)
        edges = np.unique(np.quantile(length, np.linspace(0, 1, 9)))
        place = np.clip(np.searchsorted(edges, length, side="right") - 1, 0, len(edges) - 1)
        binned = [(length[place == k].mean(), reward[place == k].mean()) for k in np.unique(place)]
        axes.plot(*zip(*binned, strict=True), "o-", color=colour, markersize=4, label=f"{name}, mean")
    axes.set(xlabel="completion length, tokens", ylabel="reward")
    axes.legend(loc="lower right")
    return True


def _measured(
    axes: Any, content: Content, score: Callable[[dict[str, Any], dict[str, Any]], tuple[float, float]]
) -> None:
    """The models' points over KL, with two standard errors."""
    assert content.summary is not None
    farthest = 3 * max(axes.get_xlim()[1], content.summary["kl"]["mean"] or 0.0)
    compared = {"policy": content.summary, **content.summary.get("others", {})}
    for name, one in compared.items():
        value, error = score(content.summary["policy"] if name == "policy" else one, one)
        kl = one["kl"]
        if kl["mean"] is None or (name != "policy" and kl["mean"] > farthest):
            continue  # a model without a KL, or so far away that the rest would shrink to a dot
        colour = _POLICY if name == "policy" else _INK
        axes.errorbar(
            kl["mean"],
            value,
            yerr=2 * error,
            xerr=2 * (kl["standard_error"] or 0),
            fmt="o",
            markersize=4,
            color=colour,
            label=name,
        )


def _frontier_betas(content: Content) -> list[float]:
    settings = content.config.policy
    lowest = get_transform(settings.transform).min_beta
    return [beta for beta in settings.beta * np.geomspace(0.15, 30, 36) if beta > lowest]


def _win_rate_frontier(axes: Any, content: Content) -> bool:
    settings = content.config.policy
    if content.summary is None or settings.loss != "qrpo":
        return False
    curve = beta_table(settings.transform, _frontier_betas(content))
    axes.plot(
        [row["kl"] for row in curve],
        [row["win_rate"] for row in curve],
        color=_THEORY,
        label="theoretical frontier",
    )
    (best,) = beta_table(settings.transform, [settings.beta])
    axes.plot(best["kl"], best["win_rate"], "D", color=_THEORY, label=f"optimum, beta {settings.beta:g}")
    got = attained(settings.transform, settings.beta, content.config.completions.num_ref)
    axes.plot(
        got.kl, got.win_rate, "s", color=_THEORY, fillstyle="none", label=f"from {got.num_ref} references"
    )
    axes.plot(0, 0.5, "o", color=_REFERENCE, label="reference")
    _measured(
        axes,
        content,
        lambda _, one: (one["win_rate"]["mean"], (one["win_rate"]["high"] - one["win_rate"]["low"]) / 4),
    )
    axes.set(xlabel="KL to the reference, nats", ylabel="win rate against the reference")
    axes.legend(loc="lower right")
    return True


def _reward_frontier(axes: Any, content: Content) -> bool:
    settings = content.config.policy
    if content.summary is None or settings.loss != "qrpo":
        return False
    flat = np.concatenate(content.ref_rewards)
    offsets = np.cumsum([0, *(len(rewards) for rewards in content.ref_rewards)])
    curve = beta_table(settings.transform, _frontier_betas(content))
    means = [
        float(np.nanmean(expected_reward(settings.transform, row["beta"], flat, ref_offsets=offsets)))
        for row in curve
    ]
    axes.plot([row["kl"] for row in curve], means, color=_THEORY, label="theoretical frontier")
    reference = content.summary["reference"]["reward"]
    axes.errorbar(
        0,
        reference["mean"],
        yerr=2 * (reference["standard_error"] or 0),
        fmt="o",
        markersize=4,
        color=_REFERENCE,
        label="reference",
    )
    _measured(
        axes,
        content,
        lambda described, _: (described["reward"]["mean"], described["reward"]["standard_error"] or 0),
    )
    axes.set(xlabel="KL to the reference, nats", ylabel="mean reward")
    axes.legend(loc="lower right")
    return True


def _noise(axes: Any, content: Content) -> bool:
    settings, num_ref = content.config.policy, content.config.completions.num_ref
    if settings.loss != "qrpo" or not content.ref_rewards:
        return False
    counts = sorted({1, 2, 3, 5, 10, 20, 50, 100, num_ref})
    noise = [estimate_noise(settings.transform, n).noise / settings.beta for n in counts]
    axes.plot(counts, noise, "o-", color=_THEORY, markersize=3.5, label="in theory")
    here = estimate_noise(settings.transform, num_ref).noise / settings.beta
    axes.plot(num_ref, here, "o", color=_POLICY, markersize=8, label=f"this run, n = {num_ref}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="reference samples a prompt (num_ref)",
        ylabel="noise of the target log ratio, nats",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks([1, 3, 10, 30, 100])
    axes.set_yticks(
        [
            size
            for size in np.outer(10.0 ** np.arange(-3, 4), [1, 3]).ravel()
            if min(noise) / 1.5 < size < max(noise) * 1.5
        ]
    )
    axes.legend()
    return True


_FIGURES: dict[str, tuple[str, str, Callable[[Any, Content], bool]]] = {
    "rewards": ("Rewards", "Fresh completions of both models on the held-out prompts.", _rewards),
    "density": (
        "Quantile rewards",
        "Flat for the reference; the curve is what the optimum at this beta would show.",
        _density,
    ),
    "win-rate": (
        "Win rate against KL",
        "What each beta promises, and where the policy came to; bars are two standard errors. Models far off are left out.",
        _win_rate_frontier,
    ),
    "reward-kl": (
        "Reward against KL",
        "The frontier from the held-out prompts' own reference rewards.",
        _reward_frontier,
    ),
    "length": ("Reward against length", "Points are completions, lines their means by length.", _length),
    "noise": (
        "What num_ref costs",
        "Quantiles from few references are noisy targets; the error falls with the root of their number.",
        _noise,
    ),
    "loss": ("Loss", "Pale: every logged step; dark: smoothed.", _curve("loss", "loss")),
    "log-ratio": (
        "Log ratio of training completions",
        "log policy - log reference, and the value that the objective asks for.",
        _curve("log_ratio/mean", "nats", ("log_ratio/target",)),
    ),
    "gradient": ("Gradient norm", "Before clipping.", _curve("grad_norm", "norm")),
    "accuracy": (
        "Order of pairs",
        "Share of training pairs that the policy ranks as their rewards do.",
        _curve("rewards/accuracies", "share"),
    ),
}
