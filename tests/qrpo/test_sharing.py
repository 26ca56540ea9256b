"""A prompt's forward shared by its completions: the same numbers, from fewer tokens."""

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from qrpo.training.batches import shared_batches, worth_sharing
from qrpo.training.logprobs import can_share, completion_logprobs, score_logprobs
from qrpo.training.runs import load_policy, training_arguments
from qrpo.training.settings import PolicyConfig
from qrpo.training.trainer import QRPOTrainer

SMALL = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def draw(completions_of_each, prompt=(8, 20)):
    """Prompts repeated as one object, as flattened rows have them."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(6, 250, size=rng.integers(low, high)).tolist()

    prompts = [prompt_ids for count in completions_of_each for prompt_ids in [ids(*prompt)] * count]
    return prompts, [ids(0, 9) for _ in prompts]


def value_and_gradients(model, *arguments, **keywords):
    model.zero_grad()
    logprob_B = completion_logprobs(model, *arguments, **keywords)
    (logprob_B**2).sum().backward()
    return logprob_B.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


# Llama's norms and rotations are float32 in any model, and with them what their gradients are rounded to.
@pytest.mark.parametrize(
    ("make", "rounding"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), 1e-4),
        (
            lambda: GPT2LMHeadModel(
                GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64)
            ),
            1e-10,
        ),
    ],
    ids=["rotary positions", "learned positions"],
)
def test_log_probabilities_and_gradients_are_those_of_rows_apart(make, rounding):
    torch.manual_seed(0)
    model = make().double().eval()
    prompts, completions = draw([3, 1, 4, 2])

    assert can_share(model)
    apart, apart_gradients = value_and_gradients(model, prompts, completions)
    shared, shared_gradients = value_and_gradients(model, prompts, completions, share_prompts=True)

    torch.testing.assert_close(shared, apart, rtol=1e-12, atol=1e-12)
    for name, gradient in apart_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
        lambda: BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=16, n_layer=1, n_head=2)),
        lambda: LlamaForCausalLM._from_config(LlamaConfig(**SMALL), attn_implementation="eager"),
    ],
    ids=["sliding window", "positions from the mask", "attention that reads masks otherwise"],
)
def test_models_that_would_give_other_numbers_do_not_share(make):
    assert not can_share(make())


def test_a_batch_holds_whole_groups_within_the_budget_and_long_prompts_are_worth_it():
    prompts, completions = draw([6, 2, 4], prompt=(8, 9))

    batches = shared_batches(prompts, completions, token_budget=30, group=2)

    assert sorted(place for batch in batches for place in batch) == list(range(12))
    for batch in batches:
        rows = {id(prompts[place]): len(prompts[place]) for place in batch}
        assert sum(rows.values()) + sum(len(completions[place]) for place in batch) <= 30
        assert all(
            batch[start] % 2 == 0 and batch[start + 1] == batch[start] + 1
            for start in range(0, len(batch), 2)
        )
    assert worth_sharing(prompts, completions)
    assert not worth_sharing(prompts, [[7] * 90 for _ in prompts])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["qrpo", "dpo"])
def test_training_ends_with_the_weights_of_rows_apart(folder, make_rows, tmp_path, loss):
    rows = [{**row, "prompt_token_ids": row["prompt_token_ids"] * 5} for row in make_rows(6, 3)]
    reference = load_policy(folder)
    assert can_share(reference)
    for row, scores in zip(rows, score_logprobs(reference, rows, 200, share_prompts=True), strict=True):
        row["ref_logprob"] = scores
    apart = np.concatenate(list(score_logprobs(reference, rows, 200)))
    np.testing.assert_allclose(
        np.concatenate([row["ref_logprob"] for row in rows]), apart, rtol=1e-5, atol=1e-5
    )

    def weights_after(share):
        settings = PolicyConfig(
            learning_rate=1e-3, prompts_per_step=3, share_prompts=share, token_budget=200, loss=loss
        )
        arguments = training_arguments(settings, tmp_path / str(share))
        trainer = QRPOTrainer(load_policy(folder).double(), arguments, rows)
        assert trainer._can_share == share
        trainer.train()
        assert trainer.state.log_history[0]["initial_log_ratio/max_abs"] < 1e-4
        return trainer.model.state_dict()

    plain = weights_after(False)
    for name, weight in weights_after(True).items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=2e-5)
