"""The comparison of methods: chosen on one half, reported on the other, differences prompt by prompt."""

import numpy as np
import pytest

from qrpo.errors import DataError
from qrpo.evaluation.comparison import Contender, compare_methods, selection_half

PROMPTS = [f"prompt-{number}" for number in range(40)]


def contender(name, reward_SP: np.ndarray):
    return Contender({"name": name}, {"reward": reward_SP, "length": reward_SP * 0 + 7})


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other():
    chosen = selection_half(PROMPTS)
    lucky = np.where(chosen, 1.0, 0.0)[None].repeat(
        2, 0
    )  # good where it is chosen by, bad where it is judged
    steady = np.full((2, 40), 0.6)
    report = compare_methods({"one": [contender("steady", steady), contender("lucky", lucky)]}, PROMPTS)
    assert report["prompts"] == 20
    method = report["methods"]["one"]
    assert method["settings"] == {"name": "lucky"}
    assert [tried["reward"] for tried in method["tried"]] == pytest.approx([0.6, 1.0])
    assert method["scores"]["reward"]["mean"] == 0.0
    assert method["scores"]["length"]["mean"] == 7.0


def test_the_lead_of_the_first_is_paired_by_prompt():
    rng = np.random.default_rng(0)
    difficulty_P = rng.normal(size=40)
    first = contender("first", difficulty_P + 0.1 + 0.001 * rng.normal(size=(3, 40)))
    second = contender("second", difficulty_P + 0.001 * rng.normal(size=(3, 40)))
    report = compare_methods({"first": [first], "second": [second]}, PROMPTS)
    assert "behind" not in report["methods"]["first"]
    behind = report["methods"]["second"]["behind"]
    assert 0.09 < behind["low"] < behind["mean"] < behind["high"] < 0.11  # prompts differ by far more
    own = report["methods"]["second"]["scores"]["reward"]
    assert own["high"] - own["low"] > 0.3


def test_scores_of_other_prompts_are_refused():
    with pytest.raises(DataError, match=r"shapes \[\(2, 39\)\] for 40 prompts"):
        compare_methods({"one": [contender("short", np.zeros((2, 39)))]}, PROMPTS)
