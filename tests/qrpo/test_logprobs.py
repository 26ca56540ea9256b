import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from qrpo.errors import DataError, ModelError
from qrpo.tiny import build_tiny_model
from qrpo.training.batches import length_sorted_batches
from qrpo.training.logprobs import completion_logprobs, score_logprobs
from tests.support.training import plain_logprobs, value_and_gradients

SMALL = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}


class MultipliedLogits(GraniteForCausalLM):
    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        output.logits = output.logits * self.config.logits_scaling**2
        return output


class ShiftedLogits(LlamaForCausalLM):
    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        output.logits = output.logits.tanh() + torch.arange(output.logits.shape[-1]) / 100
        return output


class HiddenLogits(LlamaForCausalLM):
    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        output.logits = output.logits + self.model.embed_tokens(input_ids).sum(-1, keepdim=True).sin()
        return output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny_model(tmp_path_factory.mktemp("model"), ["some words"], hidden_size=32)
    return AutoModelForCausalLM.from_pretrained(folder)


def draw_rows(count, completions_per_row=1, seed=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(6, 250, size=rng.integers(low, high)).tolist()

    return [
        {
            "prompt_token_ids": ids(1, 9),
            "completion_token_ids": [ids(1, 20) for _ in range(completions_per_row)],
        }
        for _ in range(count)
    ]


def flat(rows):
    prompts = [row["prompt_token_ids"] for row in rows for _ in row["completion_token_ids"]]
    return prompts, [completion for row in rows for completion in row["completion_token_ids"]]


def assert_plain(model, prompts, completions, rtol, gradient_rtol, weights=1.0, **options):
    """The numbers and gradients of `completion_logprobs` are those of all logits."""
    ours, ours_grad = value_and_gradients(
        completion_logprobs, model, prompts, completions, weights=weights, **options
    )
    plain, plain_grad = value_and_gradients(plain_logprobs, model, prompts, completions, weights=weights)
    torch.testing.assert_close(ours, plain, rtol=rtol, atol=rtol)
    assert ours_grad.keys() == plain_grad.keys()
    for name, gradient in plain_grad.items():
        torch.testing.assert_close(ours_grad[name], gradient, rtol=gradient_rtol, atol=gradient_rtol)


# 1 row of logits at a time, a chunk that cuts through sequences, everything in one chunk
@pytest.mark.parametrize("chunk_elements", [1, 7 * 512, 2**26])
def test_value_and_gradient_equal_the_plain_computation_in_float64(model, chunk_elements):
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    options = {"weights": weights, "chunk_elements": chunk_elements}
    assert_plain(model.double(), *flat(draw_rows(7)), 1e-12, 1e-10, **options)
    model.float()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            lambda: Gemma2ForCausalLM(
                Gemma2Config(**{**SMALL, "num_hidden_layers": 2}, head_dim=8, final_logit_softcapping=0.5)
            ),
            id="capped logits, tied head",
        ),
        pytest.param(
            lambda: GPT2LMHeadModel(
                GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64)
            ),
            id="learned positions, tied head",
        ),
        pytest.param(lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)), id="scaled"),
        pytest.param(lambda: PhiForCausalLM(PhiConfig(**SMALL)), id="head with a bias"),
        pytest.param(
            lambda: FalconH1ForCausalLM(FalconH1Config(**SMALL, **MAMBA, lm_head_multiplier=0.1)),
            id="a multiplier of another name",
        ),
        pytest.param(
            lambda: MultipliedLogits(GraniteConfig(**SMALL, logits_scaling=0.5)),
            id="a scale that multiplies, as HyperCLOVA X does",
        ),
        pytest.param(lambda: ShiftedLogits(LlamaConfig(**SMALL)), id="logits of a formula of their own"),
    ],
)
def test_other_architectures_agree_with_their_own_forward(other):
    torch.manual_seed(0)
    model = other().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # some norms are float32 in any model, and their gradients
    assert_plain(model, *flat(draw_rows(4)), 1e-10, 1e-4, chunk_elements=7 * 256)


def test_logits_that_do_not_follow_from_the_hidden_states_are_refused():
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"HiddenLogits: its logits do not follow .* by its own forward by"):
        completion_logprobs(HiddenLogits(LlamaConfig(**SMALL)), [[3, 4]], [[5, 6]])


def test_an_adapted_head_and_a_frozen_one_have_the_plain_gradients():
    import peft

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    ).double()
    for model in (adapted, base.requires_grad_(False)):
        model.get_input_embeddings().weight.requires_grad_(True)
        assert_plain(model, *flat(draw_rows(3)), 1e-9, 1e-9)


def test_mixed_precision_rounds_as_autocast_does():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    prompts, completions = flat(draw_rows(5))
    _, exact = value_and_gradients(plain_logprobs, model, prompts, completions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [
            value_and_gradients(compute, model, prompts, completions)
            for compute in (completion_logprobs, plain_logprobs)
        ]

    assert found[0][0].dtype == torch.float32
    for name, gradient in exact.items():
        errors = [(gradients[name] - gradient).norm() / gradient.norm() for _, gradients in found]
        assert errors[0] < max(1.5 * errors[1], 0.02), name


def test_no_tensor_ever_holds_all_logits(model):
    prompts, completions = flat(draw_rows(8))
    vocabulary = model.config.vocab_size
    positions = sum(map(len, completions))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                # The head's weight and its gradient end in the vocabulary too.
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.shape[-1:] == (vocabulary,)
                    and tensor.shape[0] != 32
                ):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        completion_logprobs(model, prompts, completions, chunk_elements=5 * vocabulary).sum().backward()

    assert largest == 5 * vocabulary < positions * vocabulary


def test_an_empty_completion_is_certain_and_an_empty_prompt_is_refused(model):
    logprobs = completion_logprobs(model, [[7], [8, 9]], [[], [10]])

    assert logprobs[0] == 0
    assert logprobs[1] < 0
    with pytest.raises(DataError, match="row 1 has an empty prompt"):
        completion_logprobs(model, [[7], []], [[8], [9]])


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 120))
def test_batches_hold_every_row_once_within_the_budget(lengths, token_budget):
    batches = length_sorted_batches(lengths, token_budget)

    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[i] for i in batch) * len(batch)
        assert padded <= token_budget or len(batch) == 1


@pytest.mark.parametrize(
    ("draw", "rows", "budget", "waste", "most"),
    [((4, 1), 2000, 8192, 1.15, 2000), ((6, 0.7), 64, 10**9, 1.2, 15)],
    ids=["like lengths share a batch", "a step smaller than the budget"],
)
def test_little_is_padded(draw, rows, budget, waste, most):
    lengths = np.random.default_rng(0).lognormal(*draw, size=rows).astype(int) + 1
    batches = length_sorted_batches(lengths.tolist(), budget)
    assert sum(lengths[batch].max() * len(batch) for batch in batches) < waste * lengths.sum()
    assert len(batches) <= most


@pytest.mark.slow
def test_a_vocabulary_of_128k_at_2k_tokens_does_not_fill_the_memory():
    """The logits would be 1,002 MiB, and as much again for their softmax and their gradient; a chunk is 16 MiB."""
    script = textwrap.dedent("""
        import torch
        from pathlib import Path
        from transformers import LlamaConfig, LlamaForCausalLM
        from qrpo.training.logprobs import completion_logprobs

        def resident(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

        torch.set_num_threads(1)
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128_256, max_position_embeddings=4096, **sizes))
        completion_logprobs(model, [[1]], [[2, 3]]).sum().backward()  # gradients, and what libraries load
        before = resident("VmHWM")
        completion_logprobs(model, [[1] * 8], [list(range(2048))]).sum().backward()
        print(resident("VmHWM") - before)
    """)

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 600


@pytest.mark.parametrize("token_budget", [1, 64, 100_000])
def test_scores_come_in_input_order_whatever_the_budget(model, token_budget):
    rows = draw_rows(40, completions_per_row=3)

    scores = list(score_logprobs(model, iter(rows), token_budget))

    assert [s.shape for s in scores] == [(3,)] * 40
    assert scores[0].dtype == np.float32
    with torch.no_grad():
        plain = plain_logprobs(model, *flat(rows)).numpy().reshape(40, 3)
    np.testing.assert_allclose(np.stack(scores), plain, rtol=1e-5, atol=1e-4)


def test_scoring_streams_and_leaves_the_models_mode_alone(model):
    read = []
    rows = (read.append(i) or row for i, row in enumerate(draw_rows(500)))
    model.train()

    first = next(score_logprobs(model, rows, token_budget=32))

    assert first.shape == (1,)
    assert len(read) < 100
    assert model.training
