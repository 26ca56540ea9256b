"""What the training tests share: a reference of one layer, and rows that it scored."""

from functools import cache

import numpy as np
import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random Llama of one layer with its tokenizer."""
    from qrpo.tiny import build_tiny_model

    output = tmp_path_factory.mktemp("model")
    return build_tiny_model(output, ["some words", "and more"], hidden_size=16, layers=1)


@pytest.fixture(scope="session")
def make_rows(folder):
    """A function of numbers of prompts and completions: rows of random tokens, scored by the reference in `folder`."""
    from qrpo.training.logprobs import score_logprobs
    from qrpo.training.runs import load_policy

    @cache
    def draw(prompts, completions):
        rng = np.random.default_rng(0)

        def ids(low, high):
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
