"""What the training tests share: a reference of one layer, and rows that it scored."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer with its tokenizer."""
    from qrpo.tiny import build_tiny_model

    return build_tiny_model(
        tmp_path_factory.mktemp("model"), ["some words", "and more"], hidden_size=16, layers=1
    )


@pytest.fixture(scope="session")
def make_rows(folder: Path) -> Callable[[int, int], Rows]:
    """So many prompts with so many completions each, random tokens, scored by the reference in `folder`."""
    from qrpo.training.logprobs import score_logprobs
    from qrpo.training.runs import load_policy

    @cache
    def draw(prompts: int, completions: int) -> Rows:
        rng = np.random.default_rng(0)

        def ids(low: int, high: int) -> list[int]:
            return rng.integers(6, 250, size=rng.integers(low, high)).tolist()

        rows = [
            {
                "prompt_id": f"prompt-{i}",
                "prompt_token_ids": ids(2, 9),
                "completion_token_ids": [ids(1, 20) for _ in range(completions)],
                "quantile_reward": rng.random(completions).astype(np.float32),
                "num_ref": 20,
            }
            for i in range(prompts)
        ]
        for row, scores in zip(rows, score_logprobs(load_policy(folder), rows, 1000), strict=True):
            row["ref_logprob"] = scores
            row["reward"] = rng.normal(size=completions).astype(np.float32)
        return rows

    return lambda prompts, completions: [dict(row) for row in draw(prompts, completions)]
