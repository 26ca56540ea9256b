"""Facts about an artifact that the views and Prefect's UI both show: reject reasons, metrics,
numbers, model comparisons."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from storage import Manifest, Store

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_BINS = 32
_MAX_GRID = 120  # bars
MAIN_MEASURES = {
    "mean reward",
    "mean quantile reward",
    "win rate against the reference",
    "KL to the reference, nats",
    "completion length, tokens",
}
"""Titles of the rows of `compare_models` for a brief table."""


def reject_reasons(store: Store, manifest: Manifest, limit: int = 10) -> dict[str, int]:
    """Reason -> number of rejected rows, the most frequent reasons first."""
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        if part.rejects:
            counts.update(store.read_rejects(part)["reason"].to_pylist())
    return dict(counts.most_common(limit))


def training_metrics(store: Store, manifest: Manifest) -> pl.DataFrame | None:
    """What a training run logged, one row per logged step. None for an artifact without
    `metrics.parquet`."""
    data = store.read_file(manifest.parts[0], "metrics.parquet") if manifest.parts else None
    return None if data is None else pl.read_parquet(data)


def grid_edges(values: Any) -> Any:
    """Edges of one bin for each point of the grid of the values; None if they are on no grid or on
    too large a one.

    Other bins would hold one point here and two there, and show a comb.
    """
    distinct = np.unique(np.asarray(values, dtype=np.float64))
    if not 1 < len(distinct) <= _MAX_GRID:
        return None
    steps = (distinct - distinct[0]) / np.diff(distinct).min()
    if steps[-1] > _MAX_GRID or np.abs(steps - steps.round()).max() > 1e-3:
        return None
    count = round(steps[-1])
    return distinct[0] + (distinct[-1] - distinct[0]) / count * (np.arange(count + 2) - 0.5)


def numbers_of(values: pl.Series) -> dict[str, Any] | None:
    """Count, mean, extremes, quantiles and histogram of the finite values. None if there are
    none."""
    if not values.dtype.is_numeric():
        return None
    finite = values.cast(pl.Float64).drop_nulls()
    finite = finite.filter(finite.is_finite())
    if finite.is_empty():
        return None
    quantiles = [finite.quantile(share, "linear") for share in QUANTILES]
    low, high = float(quantiles[0] or 0.0), float(quantiles[-1] or 0.0)
    edges = grid_edges(finite)
    if edges is None:
        edges = np.linspace(low, high, _BINS + 1) if high > low else np.array([low, high])
    counts, _ = np.histogram(finite, edges)
    return {
        "count": len(finite),
        "mean": finite.mean(),
        "std": finite.std(),
        "min": low,
        "max": high,
        "quantiles": quantiles,
        "histogram": {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()},
    }


@dataclass(frozen=True)
class Cell:
    """One number as text, and its error or interval."""

    value: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.note}".strip()


def compare_models(summary: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Cell]]]:
    """The models' names (and the optimum, if the loss has a theory), and title -> cells of each
    measure."""
    others = summary.get("others", {})
    described = [summary["reference"], summary["policy"], *others.values()]
    compared = [summary, *others.values()]
    controlled = [one["length_controlled"] for one in compared]
    slopes = [one["reward_per_token"]["model"] for one in controlled]

    def each(key: str, digits: int = 3) -> list[Cell]:
        return [_measured(one[key], digits) for one in described]

    def diversity(key: str) -> list[Cell]:
        return [_measured(one["diversity"][key]) for one in described]

    def gains(key: str) -> list[Cell]:
        return [Cell(), *(_measured(one[key]) for one in controlled)]

    rows = {
        "mean reward": each("reward"),
        "mean quantile reward": each("quantile_reward"),
        "win rate against the reference": [Cell("0.5"), *(interval(one["win_rate"]) for one in compared)],
        "win rate at equal length": [Cell("0.5"), *(interval(one["win_rate"]) for one in controlled)],
        "reward gained": gains("reward_gain_unadjusted"),
        "reward gained at equal length": gains("reward_gain"),
        "reward per token of length": [
            _measured(slope, 4) for slope in (controlled[0]["reward_per_token"]["reference"], *slopes)
        ],
        "KL to the reference, nats": [Cell("0"), *(_measured(one["kl"]) for one in compared)],
        "completion length, tokens": each("length", 2),
        "distinct completions of a prompt": diversity("unique"),
        "distinct token pairs": diversity("distinct_2"),
        "overlap of two completions": diversity("self_similarity"),
        "finished by": [
            Cell(", ".join(f"{reason} {count:,}" for reason, count in one["finish_reasons"].items()))
            for one in described
        ],
    }
    names = ["reference", "policy", *others]
    if theory := summary.get("theory"):
        names.append(f"optimum for beta {theory['beta']:g}")
        optimum = {
            "mean quantile reward": theory["quantile_reward"],
            "win rate against the reference": theory["quantile_reward"],
            "KL to the reference, nats": theory["kl"],
        }
        for title, cells in rows.items():
            cells.append(Cell(f"{optimum[title]:.3f}" if title in optimum else ""))
    return names, rows


def _measured(value: Mapping[str, Any], digits: int = 3) -> Cell:
    if value["mean"] is None:
        return Cell("-")
    error = value["standard_error"]
    return Cell(f"{value['mean']:.{digits}f}", f"± {error:.{digits}f}" if error is not None else "")


def interval(value: Mapping[str, Any]) -> Cell:
    """A mean with its 95% interval; a dash where there is none."""
    if value["mean"] is None:
        return Cell("-")
    return Cell(f"{value['mean']:.3f}", f"({value['low']:.3f} to {value['high']:.3f})")
