"""The report's figures: matplotlib figures as inline SVG in the page's own colours, so that they
follow light and dark."""

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
from qrpo.method.optimum import expected_reward, optimum_density
from qrpo.method.theory import attained, beta_table, estimate_noise
from qrpo.method.transforms import get_transform
from tasks.charts import plot_curves, plot_histogram

# placeholders in the drawing for the page's CSS variables
_INK, _FAINT, _POLICY, _REFERENCE, _THEORY = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    _INK: "currentColor",
    _FAINT: "var(--line)",
    _POLICY: "var(--policy)",
    _REFERENCE: "var(--reference)",
    _THEORY: "var(--theory)",
}
_COLOURS = {"reference": _REFERENCE, "policy": _POLICY}
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
_POINTS = 1_500  # of a scatter plot; more only makes the page larger


@dataclass(frozen=True)
class Plot:
    """One figure with its heading and what it shows."""

    title: str
    text: str
    svg: Markup


def draw(content: Content) -> list[Plot]:
    """The figures that the run has data for, in the order of the page."""
    plots = []
    for name, (title, text, figure) in _FIGURES.items():
        with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
            drawing = Figure(figsize=(4.6, 3.2), layout="constrained")
            if figure(drawing.subplots(), content):
                plots.append(Plot(title, text, _svg(drawing, name, title)))
    return plots


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an SVG element with unique ids, page colours, a label, and no metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    head = rf'<svg \1 role="img" aria-label="{title}">'
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, svg, count=1)
    svg = svg.replace("xlink:href=", "href=")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


def _values(content: Content, column: str) -> dict[str, Floats]:
    """Model -> a column of its samples."""
    assert content.evaluation is not None
    return {
        name: content.evaluation.filter(pl.col("model") == name)[column].to_numpy().astype(float)
        for name in _COLOURS
    }


def _rewards(axes: Any, content: Content) -> bool:
    if content.evaluation is not None:
        values = _values(content, "reward")
    elif content.ref_rewards:
        values = {"reference": np.concatenate(content.ref_rewards)}
    else:
        return False
    distinct = len(np.unique(np.concatenate(list(values.values()))))
    plot_histogram(axes, values, min(40, max(10, distinct)), colours=_COLOURS)
    axes.set(xlabel="reward (dashed: means)", ylabel="share of completions")
    return True


def _density(axes: Any, content: Content) -> bool:
    settings = content.config.policy
    if content.evaluation is None:
        return False
    if settings.loss == "qrpo":
        t = np.linspace(0.002, 0.998, 400)
        density = optimum_density(settings.transform, settings.beta, t)
        axes.plot(t, density, color=_THEORY, label=f"optimum, beta {settings.beta:g}")
    axes.axhline(1.0, color=_INK, linestyle=":", linewidth=1)
    plot_histogram(axes, _values(content, "quantile_reward"), 20, density=True, colours=_COLOURS)
    axes.set(xlabel="quantile reward", ylabel="density", xlim=(0, 1))
    return True


def _curve(label: str, *columns: str) -> Callable[[Any, Content], bool]:
    def figure(axes: Any, content: Content) -> bool:
        if content.metrics is None or columns[0] not in content.metrics.columns:
            return False
        shown = [name for name in columns if name in content.metrics.columns]
        plot_curves(axes, content.metrics, shown, (_POLICY, _THEORY))
        axes.set(ylabel=label)
        return True

    return figure


def _length(axes: Any, content: Content) -> bool:
    if content.evaluation is None:
        return False
    rng = np.random.default_rng(0)
    lengths, rewards = _values(content, "length"), _values(content, "reward")
    for name, colour in _COLOURS.items():
        length, reward = lengths[name], rewards[name]
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


def _frontier(axes: Any, content: Content) -> list[dict[str, Any]]:
    """The optima of a range of betas around the run's own; none for a loss without this theory."""
    settings = content.config.policy
    if content.summary is None or settings.loss != "qrpo":
        return []
    axes.set(xlabel="KL to the reference, nats")
    lowest = get_transform(settings.transform).min_beta
    betas = settings.beta * np.geomspace(0.15, 30, 36)
    return list(beta_table(settings.transform, [beta for beta in betas if beta > lowest]))


def _plot_models(axes: Any, content: Content, score: Callable[[Any, Any], tuple[float, float]]) -> None:
    """A point per model over its KL, with two standard errors; `score` of its samples and its
    comparison."""
    summary = content.summary or {}
    farthest = 3 * max(axes.get_xlim()[1], summary["kl"]["mean"] or 0.0)
    for name, one in {"policy": summary, **summary.get("others", {})}.items():
        value, error = score(one["policy"] if name == "policy" else one, one)
        kl = one["kl"]
        if kl["mean"] is None or (name != "policy" and kl["mean"] > farthest):
            continue  # a model without a KL, or so far away that the rest would shrink to a dot
        style = {"fmt": "o", "markersize": 4, "color": _COLOURS.get(name, _INK), "label": name}
        axes.errorbar(kl["mean"], value, yerr=2 * error, xerr=2 * (kl["standard_error"] or 0), **style)
    axes.legend(loc="lower right")


def _win_rate_frontier(axes: Any, content: Content) -> bool:
    curve, settings = _frontier(axes, content), content.config.policy
    if not curve:
        return False
    kl, win_rate = ([row[key] for row in curve] for key in ("kl", "win_rate"))
    axes.plot(kl, win_rate, color=_THEORY, label="theoretical frontier")
    (best,) = beta_table(settings.transform, [settings.beta])
    axes.plot(best["kl"], best["win_rate"], "D", color=_THEORY, label=f"optimum, beta {settings.beta:g}")
    got = attained(settings.transform, settings.beta, content.config.completions.num_ref)
    label = f"from {got.num_ref} references"
    axes.plot(got.kl, got.win_rate, "s", color=_THEORY, fillstyle="none", label=label)
    axes.plot(0, 0.5, "o", color=_REFERENCE, label="reference")
    axes.set(ylabel="win rate against the reference")

    def score(_: Any, compared: Any) -> tuple[float, float]:
        wins = compared["win_rate"]
        return wins["mean"], (wins["high"] - wins["low"]) / 4

    _plot_models(axes, content, score)
    return True


def _reward_frontier(axes: Any, content: Content) -> bool:
    curve, settings = _frontier(axes, content), content.config.policy
    if not curve or content.summary is None:
        return False
    flat = np.concatenate(content.ref_rewards)
    offsets = np.cumsum([0, *(len(rewards) for rewards in content.ref_rewards)])
    rewards = (expected_reward(settings.transform, row["beta"], flat, ref_offsets=offsets) for row in curve)
    means = [float(np.nanmean(one)) for one in rewards]
    axes.plot([row["kl"] for row in curve], means, color=_THEORY, label="theoretical frontier")

    def score(described: Any, _: Any = None) -> tuple[float, float]:
        return described["reward"]["mean"], described["reward"]["standard_error"] or 0

    mean, error = score(content.summary["reference"])
    axes.errorbar(0, mean, yerr=2 * error, fmt="o", markersize=4, color=_REFERENCE, label="reference")
    axes.set(ylabel="mean reward")
    _plot_models(axes, content, score)
    return True


def _noise(axes: Any, content: Content) -> bool:
    settings, num_ref = content.config.policy, content.config.completions.num_ref
    if settings.loss != "qrpo" or not content.ref_rewards:
        return False
    noise = {
        count: estimate_noise(settings.transform, count).noise / settings.beta
        for count in sorted({1, 2, 3, 5, 10, 20, 50, 100, num_ref})
    }
    axes.plot(noise.keys(), noise.values(), "o-", color=_THEORY, markersize=3.5, label="in theory")
    axes.plot(num_ref, noise[num_ref], "o", color=_POLICY, markersize=8, label=f"this run, n = {num_ref}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="reference samples per prompt (num_ref)",
        ylabel="noise of the target log ratio, nats",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks([1, 3, 10, 30, 100])
    low, high = min(noise.values()) / 1.5, max(noise.values()) * 1.5
    axes.set_yticks([y for y in np.outer(10.0 ** np.arange(-3, 4), [1, 3]).ravel() if low < y < high])
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
        "What each beta promises, and where the policy is; bars are two standard errors. Models far off are not shown.",
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
        _curve("nats", "log_ratio/mean", "log_ratio/target"),
    ),
    "gradient": ("Gradient norm", "Before clipping.", _curve("norm", "grad_norm")),
    "accuracy": (
        "Order of pairs",
        "Share of training pairs that the policy ranks as their rewards do.",
        _curve("share", "rewards/accuracies"),
    ),
}
