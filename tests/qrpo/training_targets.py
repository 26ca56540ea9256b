"""What the training tests run in processes of their own: generator functions for `qrpo.child` and `qrpo.launch`."""

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrpo.optimization import PolicyConfig
from qrpo.policy import train_policy

EMPTY: dict[str, Any] = {}


def train(
    folder: Path, rows: Path, output: Path, settings: dict[str, Any], arguments: dict[str, Any] = EMPTY
) -> Iterator[Any]:
    """Train on pickled rows; yields what is reported, at the end."""
    import torch

    torch.set_num_threads(1)
    reports: list[dict[str, Any]] = []
    config = PolicyConfig(**settings)
    train_policy(folder, pickle.loads(rows.read_bytes()), config, output, on_progress=reports.append)  # noqa: S301
    yield from reports
