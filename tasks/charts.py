"""The pictures that a stage shows in Prefect's UI: one PNG a stage, drawn from columns of its artifact.

Only the columns that a picture needs are read. Where nothing is to be drawn (no rows, a stage without a picture) there is none.
"""

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from storage import Manifest, Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Chart", "draw", "metrics_of"]

Chart = tuple[str, bytes]
"""A title and a PNG file."""
_MOST_VALUES = 2_000_000  # a histogram of more looks the same


def draw(manifest: Manifest, store: Store) -> Chart | None:
    """The stage's picture, or None where it has none."""
    if manifest.stage not in _DRAWERS or not manifest.rows:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    title = _DRAWERS[manifest.stage](axes, manifest, store)
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return title, file.getvalue()


def metrics_of(manifest: Manifest, store: Store) -> pl.DataFrame:
    """What a training run logged, one row a logged step; empty where it left no such file."""
    for part in manifest.parts:
        for file in part.payload:
            if file.name == "metrics.parquet":
                return pl.read_parquet(io.BytesIO(store.read_bytes(file.key)))
    return pl.DataFrame()


def _lengths(axes: "Axes", manifest: Manifest, store: Store) -> str:
    columns = store.scan(manifest.parts).select("origin", length=pl.col("token_ids").list.len())
    _histogram(axes, _by_origin(columns, "length"))
    axes.set(xlabel="tokens in a completion", ylabel="completions")
    return "Lengths of the completions"


def _rewards(axes: "Axes", manifest: Manifest, store: Store) -> str:
    columns = store.scan(manifest.parts).select("origin", "reward").filter(pl.col("reward").is_not_null())
    _histogram(axes, _by_origin(columns, "reward"))
    axes.set(xlabel="reward", ylabel="completions")
    return "Rewards of the completions"


def _quantiles(axes: "Axes", manifest: Manifest, store: Store) -> str:
    lists = store.scan(manifest.parts).select("origin", "quantile_reward").collect().to_arrow()
    flat = {name: lists[name].combine_chunks().flatten() for name in lists.column_names}
    _histogram(
        axes, _by_origin(pl.LazyFrame(flat).drop_nulls(), "quantile_reward"), bins=np.linspace(0, 1, 21)
    )
    axes.set(xlabel="quantile among the reference's rewards", ylabel="training completions", xlim=(0, 1))
    return "Quantile rewards (the reference's own are uniform)"


def _training(axes: "Axes", manifest: Manifest, store: Store) -> str:
    metrics = metrics_of(manifest, store)
    logged = metrics.filter(pl.col("loss").is_not_null()) if "loss" in metrics.columns else metrics
    if len(logged):
        axes.plot(logged["step"], logged["loss"], marker="." if len(logged) < 50 else None)
    axes.set(xlabel="step", ylabel="loss")
    return "Training loss"


def _evaluation(axes: "Axes", manifest: Manifest, store: Store) -> str:
    columns = store.scan(manifest.parts).select(origin="model", value="reward")
    _histogram(axes, _by_origin(columns, "value"))
    axes.set(xlabel="reward", ylabel="held-out completions")
    return "Rewards of policy and reference on held-out prompts"


_DRAWERS: Mapping[str, Callable[["Axes", Manifest, Store], str]] = {
    "reference": _training,
    "completions": _lengths,
    "rewards": _rewards,
    "quantiles": _quantiles,
    "policy": _training,
    "evaluation": _evaluation,
}


def _by_origin(columns: pl.LazyFrame, value: str) -> dict[str, Any]:
    frame = columns.head(_MOST_VALUES).collect()
    groups = frame.group_by("origin").agg(pl.col(value)).sort("origin")
    return {row["origin"]: np.asarray(row[value]) for row in groups.to_dicts()}


def _histogram(axes: "Axes", values: Mapping[str, Any], bins: Any = 40) -> None:
    if not isinstance(bins, int) or not values:
        edges = bins
    else:
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins)
    for name, numbers in values.items():
        axes.hist(numbers, bins=edges, alpha=0.6, label=f"{name} (mean {numbers.mean():.3g})")
    axes.legend()
