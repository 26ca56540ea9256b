"""The chart that a stage shows in Prefect's UI: one PNG per stage, drawn from columns of its
artifact.

A drawer reads only the columns that it needs. `plot_histogram` and `plot_curves` also draw the
report's figures.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from storage import Manifest, Store
from tasks.artifact_summary import grid_edges, training_metrics
from tasks.stages import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Chart = tuple[str, bytes]
"""A title and a PNG file."""
Drawer = Callable[["Axes", Manifest, Store], str]
"""Draws into the axes and returns the title; `Stage.chart` names one."""
_MAX_VALUES = 2_000_000  # a histogram of more looks the same


def draw(manifest: Manifest, store: Store) -> Chart | None:
    """The stage's chart. None for a stage without one or without rows."""
    chart = STAGES[manifest.stage].chart
    if chart is None or not manifest.rows:
        return None
    module, _, function = chart.partition(":")
    drawer: Drawer = getattr(import_module(module), function)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    title = drawer(axes, manifest, store)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return title, file.getvalue()


def plot_histogram(
    axes: "Axes",
    values: Mapping[str, Any],
    bins: Any = 40,
    *,
    density: bool = False,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Histograms of named values on shared bins, one for each value of a grid, as shares or
    densities, with their means in the legend."""
    together = np.concatenate(list(values.values())) if values else np.empty(0)
    edges: Any = grid_edges(together)
    if edges is None:
        edges = np.histogram_bin_edges(together, bins) if values else bins
    for number, (name, numbers) in enumerate(values.items()):
        colour = (colours or {}).get(name, f"C{number}")
        weights = None if density else np.full(len(numbers), 1 / len(numbers))
        label = f"{name} (mean {numbers.mean():.3g})"
        axes.hist(numbers, edges, weights=weights, density=density, color=colour, alpha=0.35, label=label)
        if not density:
            axes.axvline(numbers.mean(), color=colour, linestyle="--", linewidth=1.2)
    if values:
        axes.legend(loc="upper left")


def plot_curves(axes: "Axes", metrics: pl.DataFrame, columns: Sequence[str], colours: Sequence[str]) -> None:
    """Logged metrics over training steps: every value pale, a moving average dark."""
    for name, colour in zip(columns, colours, strict=False):
        rows = metrics.select("step", name).drop_nulls()
        axes.plot(rows["step"], rows[name], color=colour, alpha=0.3, linewidth=1)
        smooth = rows[name].ewm_mean(span=max(2.0, len(rows) / 15))
        axes.plot(rows["step"], smooth, color=colour, label=name)
    axes.set(xlabel="step")
    if len(columns) > 1:
        axes.legend()


def completion_lengths(axes: "Axes", manifest: Manifest, store: Store) -> str:
    """Tokens per completion, by origin."""
    columns = store.scan(manifest.parts).select("origin", value=pl.col("token_ids").list.len())
    plot_histogram(axes, _by_origin(columns))
    axes.set(xlabel="tokens in a completion", ylabel="share of completions")
    return "Lengths of the completions"


def completion_rewards(axes: "Axes", manifest: Manifest, store: Store) -> str:
    """Rewards by origin."""
    plot_histogram(axes, _by_origin(store.scan(manifest.parts).select("origin", value="reward")))
    axes.set(xlabel="reward", ylabel="share of completions")
    return "Rewards of the completions"


def training_quantiles(axes: "Axes", manifest: Manifest, store: Store) -> str:
    """Quantile rewards of the training completions, by origin."""
    columns = store.scan(manifest.parts).select("origin", value="quantile_reward")
    columns = columns.explode("origin", "value", empty_as_null=False)
    plot_histogram(axes, _by_origin(columns), 20)
    axes.set(xlabel="quantile among the reference's rewards", ylabel="share of completions", xlim=(0, 1))
    return "Quantile rewards (the reference's own are uniform)"


def training_loss(axes: "Axes", manifest: Manifest, store: Store) -> str:
    """The loss over training steps."""
    metrics = training_metrics(store, manifest)
    if metrics is not None and "loss" in metrics.columns:
        plot_curves(axes, metrics, ["loss"], ["C0"])
    axes.set(xlabel="step", ylabel="loss")
    return "Training loss"


def evaluation_rewards(axes: "Axes", manifest: Manifest, store: Store) -> str:
    """Rewards of the evaluated models' samples."""
    plot_histogram(axes, _by_origin(store.scan(manifest.parts).select(origin="model", value="reward")))
    axes.set(xlabel="reward", ylabel="share of held-out completions")
    return "Rewards of policy and reference on held-out prompts"


def _by_origin(columns: pl.LazyFrame) -> dict[str, Any]:
    """The values that are not null, by origin."""
    frame = columns.drop_nulls().head(_MAX_VALUES).collect()
    groups = frame.group_by("origin").agg("value").sort("origin")
    return {row["origin"]: np.asarray(row["value"]) for row in groups.to_dicts()}
