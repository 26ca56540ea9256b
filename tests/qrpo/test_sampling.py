"""Seeds that never meet, and prompts that fit."""

import numpy as np
import pytest
from pydantic import ValidationError

from qrpo.config import keyed
from qrpo.data.prompts import split_of
from qrpo.engines.sampling import SamplingConfig, sample_seed
from qrpo.evaluation.comparison import selection_half
from qrpo.models.limits import Limits
from qrpo.seeds import seeded_hash


def test_no_two_samples_share_a_seed():
    seeds = {
        sample_seed(run, f"{prompt:032x}", index, namespace)
        for run in range(3)
        for prompt in range(200)
        for index in range(50)
        for namespace in ("reference", "policy")
    }
    assert len(seeds) == 3 * 200 * 50 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_never_changes_between_versions():
    # stored completions were drawn with these: new samples of old prompts must go on from the same streams
    assert sample_seed(0, "0" * 32, 0) == 7067244709205728001
    assert sample_seed(0, "0" * 32, 0) == sample_seed(0, "0" * 32, 0, "reference")
    assert sample_seed(3, "abc", 17, "policy") == 7594087781253297357


def test_splits_halves_and_hashes_never_change_between_versions():
    assert [split_of(f"p{i}", 0.5) for i in range(8)] == ["eval"] * 3 + ["train"] * 3 + ["eval"] * 2
    half = selection_half([f"p{i}" for i in range(10)], seed=1)
    assert np.flatnonzero(half).tolist() == [0, 1, 2, 3, 7]
    assert seeded_hash("pairs", 3, 4, b"\x01\x02").hex().startswith("d18b26d961e4d919")


def test_a_prompt_fits_if_it_and_the_completion_do():
    limits = Limits(max_length=100, vocab_size=50)
    assert limits.problem([1] * 90, max_tokens=10) is None
    assert limits.problem([1] * 91, 10) == (
        "the prompt's 91 tokens and 10 for the completion (max_tokens) exceed the engine's context of 100 tokens "
        "(max_model_len)"
    )
    assert limits.problem([], 100) == "the prompt has no tokens"
    assert limits.problem([49] * 100) is None
    assert limits.problem([1] * 101) == "the conversation has 101 tokens, but the reward model reads 100"
    for stray in (50, 3_000_000):
        assert limits.problem([3, stray]) == f"a token id is outside the model's vocabulary of 50: {stray}"


def test_stop_token_ids_enter_fingerprints_only_if_set():
    assert "stop_token_ids" not in keyed(SamplingConfig())
    assert keyed(SamplingConfig(stop_token_ids=(3,)))["stop_token_ids"] == [3]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
        {"seed": 3},
        {"stop_token_ids": [-1]},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        SamplingConfig.model_validate(settings)
