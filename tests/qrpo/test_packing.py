"""Packed rows and shared prompts: the numbers of separate conversations, without padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qrpo.training.batches import cut_batches
from qrpo.training.compiling import compile_layers
from qrpo.training.logprobs import best_layout, completion_logprobs, score_logprobs
from qrpo.training.runs import load_policy
from qrpo.training.settings import PolicyConfig
from qrpo.training.trainer import QRPOTrainer
from qrpo.training.trainer_arguments import training_arguments
from tests.support.training import plain_logprobs, value_and_gradients

SMALL = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SSM = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
PACKABLE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)),
    "mistral, wide window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64)),
    "experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0
        )
    ),
}
NOT_PACKABLE = {
    "narrow sliding window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "alibi": lambda: BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=16, n_layer=1, n_head=2)),
    "eager attention": lambda: LlamaForCausalLM._from_config(
        LlamaConfig(**SMALL), attn_implementation="eager"
    ),
    "state space": lambda: FalconH1ForCausalLM(FalconH1Config(**SMALL, **SSM)),
}


def draw(completions_of_each, prompt=(8, 20)):
    """Prompts repeated as one object, as flattened rows have them."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(6, 250, size=rng.integers(low, high)).tolist()

    prompts = [prompt_ids for count in completions_of_each for prompt_ids in [ids(*prompt)] * count]
    return prompts, [ids(0, 9) for _ in prompts]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PACKABLE)
def test_all_layouts_have_the_numbers_and_gradients_of_single_conversations(name, checkpointing):
    torch.manual_seed(0)
    model = PACKABLE[name]().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    prompts, completions = draw([3, 1, 4, 2])
    alone, alone_gradients = value_and_gradients(plain_logprobs, model, prompts, completions)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    assert best_layout(model) == "shared"
    for layout in ("padded", "packed", "shared"):
        logprobs, gradients = value_and_gradients(
            completion_logprobs, model, prompts, completions, layout=layout
        )
        torch.testing.assert_close(logprobs, alone, rtol=1e-5, atol=1e-5)
        for weight, gradient in alone_gradients.items():
            difference = (gradients[weight] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm(), (layout, weight)


@pytest.mark.parametrize("name", NOT_PACKABLE)
def test_a_model_that_would_give_other_numbers_keeps_padded_rows_and_its_attention(name):
    model = NOT_PACKABLE[name]()
    attention = model.config._attn_implementation

    assert best_layout(model) == "padded"
    assert model.config._attn_implementation == attention


def test_conversations_longer_than_the_attention_window_are_padded():
    model = PACKABLE["mistral, wide window"]()
    layout = best_layout(model)
    row = {"prompt_token_ids": list(range(6, 66)), "completion_token_ids": [[7] * 9, [8] * 3]}

    (scores,) = score_logprobs(model, [row], 1000, layout=layout)

    prompts = [row["prompt_token_ids"]] * 2
    expected = plain_logprobs(model, prompts, row["completion_token_ids"])
    np.testing.assert_allclose(scores, expected.detach(), rtol=1e-5)
    assert cut_batches(prompts, [[7] * 9, [8] * 3], 1000, layout, window=64)[1] == "padded"


@given(
    st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), min_size=2, max_size=4)), min_size=1),
    st.integers(1, 60),
    st.sampled_from(["padded", "packed", "shared"]),
)
def test_passes_hold_every_conversation_once_within_the_budget(prompts_and_lengths, budget, layout):
    prompts, completions = [], []
    for length, lengths in prompts_and_lengths:
        prompt = [0] * length
        prompts += [prompt] * (len(lengths) // 2 * 2)
        completions += [[0] * n for n in lengths[: len(lengths) // 2 * 2]]

    batches, used = cut_batches(prompts, completions, budget, layout, group=2)

    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    for batch in batches:
        assert all(batch[n] % 2 == 0 and batch[n + 1] == batch[n] + 1 for n in range(0, len(batch), 2))
        sizes = [len(prompts[i]) + len(completions[i]) for i in batch]
        if used == "padded":
            tokens = max(sizes) * len(batch)
        elif used == "packed":
            tokens = sum(sizes)
        else:
            tokens = sum({id(prompts[i]): len(prompts[i]) for i in batch}.values())
            tokens += sum(len(completions[i]) for i in batch)
        assert tokens <= budget or len(batch) == 2


def test_prompts_are_shared_where_that_saves_a_tenth_of_the_tokens():
    prompts, completions = draw([6, 2, 4], prompt=(8, 9))

    assert cut_batches(prompts, completions, 100, "shared")[1] == "shared"
    assert cut_batches(prompts, [[7] * 90 for _ in prompts], 100, "shared")[1] == "packed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_have_the_same_numbers_and_are_not_compiled_again():
    torch.manual_seed(0)
    model = PACKABLE["llama"]()
    layout = best_layout(model)
    prompts, completions = draw([2, 3])
    arguments = (completion_logprobs, model, prompts, completions)
    expected, gradients = value_and_gradients(*arguments, layout=layout)
    assert compile_layers(model, layout)

    graphs = []
    for size in (11, 17, 23, 31):
        ids = [[7] * size] * 2, [[8] * size, [9] * 5]
        completion_logprobs(model, *ids, layout="packed").sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    compiled, compiled_gradients = value_and_gradients(*arguments, layout=layout)

    assert graphs[1:] == [graphs[1]] * 3
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert (compiled_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm()


def test_without_a_compiler_the_layers_stay_as_they_are(caplog, monkeypatch):
    model = PACKABLE["llama"]()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/compiler",))

    with torch._inductor.utils.fresh_cache():
        assert not compile_layers(model, "packed")

    assert "compilation failed" in caplog.text
    assert best_layout(model) == "shared"


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["qrpo", "dpo"])
def test_training_ends_with_the_weights_of_padded_rows(folder, make_rows, tmp_path, loss):
    rows = [{**row, "prompt_token_ids": row["prompt_token_ids"] * 5} for row in make_rows(6, 3)]
    reference = load_policy(folder)
    assert best_layout(reference) == "shared"
    for row, scores in zip(rows, score_logprobs(reference, rows, 200, layout="shared"), strict=True):
        row["ref_logprob"] = scores
    apart = np.concatenate(list(score_logprobs(reference, rows, 200)))
    np.testing.assert_allclose(
        np.concatenate([row["ref_logprob"] for row in rows]), apart, rtol=1e-5, atol=1e-5
    )

    def weights_after(**options):
        settings = PolicyConfig(
            learning_rate=1e-3, prompts_per_step=3, token_budget=200, loss=loss, **options
        )
        arguments = training_arguments(settings, tmp_path / str(len(options)))
        trainer = QRPOTrainer(load_policy(folder).double(), arguments, rows)
        trainer.train()
        assert trainer.state.log_history[0]["initial_log_ratio/max_abs"] < 1e-4
        return trainer.model.state_dict()

    plain = weights_after(packing=False)
    for options in ({}, {"share_prompts": False, "packing": True}):
        for name, weight in weights_after(**options).items():
            torch.testing.assert_close(weight, plain[name], rtol=0, atol=2e-5)
