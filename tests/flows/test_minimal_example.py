"""`examples/minimal.py` computes what the library computes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import minimal
from qrpo import quantile_rewards
from qrpo.tiny import build_tiny_model
from qrpo.training.logprobs import score_logprobs


def test_quantiles_are_the_librarys() -> None:
    rewards, references = torch.randint(5, (6, 3)).double(), torch.randint(5, (6, 4)).double()
    torch.testing.assert_close(
        minimal.quantile_rewards(rewards, references),
        torch.from_numpy(quantile_rewards(rewards.numpy(), references.numpy(), ties="mid")),
        check_dtype=False,
    )
    torch.testing.assert_close(
        minimal.quantile_rewards(references, references, own=1),
        torch.from_numpy(
            quantile_rewards(
                references.numpy(),
                references.numpy(),
                ties="mid",
                in_reference=torch.ones(6, 4).bool().numpy(),
            )
        ),
        check_dtype=False,
    )


def test_log_probabilities_are_the_librarys_and_samples_end_with_the_end_token(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", ["sort the letters"], vocab_size=300)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(text) for text in ("sort", "sort the letters of a long prompt")]
    torch.manual_seed(0)
    groups = minimal.sample(model, tokenizer, prompts, 20)
    assert [len(group) for group in groups] == [20, 20]
    for prompt, group in zip(prompts, groups, strict=True):
        assert all(row[0] == prompt for row in group)
        for _, ids in group:
            assert 1 <= len(ids) <= 12
            assert tokenizer.eos_token_id not in ids[:-1]
        with torch.no_grad():
            ours = minimal.logprobs(model, group)
        rows = [{"prompt_token_ids": prompt, "completion_token_ids": [ids for _, ids in group]}]
        (theirs,) = score_logprobs(model, rows, token_budget=512)
        assert ours.tolist() == pytest.approx(theirs, abs=1e-4)


def test_the_file_stays_a_short_read() -> None:
    assert len(Path(minimal.__file__).read_text().splitlines()) <= 150
