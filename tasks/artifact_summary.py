"""Facts about a committed artifact that the views and Prefect's UI both show: reject reasons, logged training metrics."""

import io
from collections import Counter

import polars as pl

from storage import Manifest, Store

__all__ = ["reject_reasons", "training_metrics"]


def reject_reasons(store: Store, manifest: Manifest, limit: int = 10) -> dict[str, int]:
    """Reason -> number of rejected rows, the most frequent reasons first."""
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        if part.rejects:
            counts.update(store.read_rejects(part)["reason"].to_pylist())
    return dict(counts.most_common(limit))


def training_metrics(store: Store, manifest: Manifest) -> pl.DataFrame | None:
    """What a training run logged, one row per logged step. None for an artifact without `metrics.parquet`."""
    for part in manifest.parts:
        for file in part.payload:
            if file.name == "metrics.parquet":
                return pl.read_parquet(io.BytesIO(store.read_bytes(file.key)))
    return None
