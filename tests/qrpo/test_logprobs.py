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
from tests.support.training import plain_logprobs

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


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# 1 row of logits at a time, a chunk that cuts through sequences, everything in one chunk
@pytest.mark.parametrize("chunk_elements", [1, 7 * 512, 2**26])
def test_value_and_gradient_equal_the_plain_computation_in_float64(model, chunk_elements):
    model = model.double()
    prompts, completions = flat(draw_rows(7))
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)

    ours = completion_logprobs(model, prompts, completions, chunk_elements=chunk_elements)
    ours_grad = gradients(model, (weights * ours**2).sum())
    plain = plain_logprobs(model, prompts, completions)
    plain_grad = gradients(model, (weights * plain**2).sum())
    model.float()

    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for name, gradient in plain_grad.items():
        torch.testing.assert_close(ours_grad[name], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**{**SMALL, "num_hidden_layers": 2}, head_dim=8, final_logit_softcapping=0.5)
        ),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
        lambda: PhiForCausalLM(PhiConfig(**SMALL)),
        lambda: FalconH1ForCausalLM(FalconH1Config(**SMALL, **MAMBA, lm_head_multiplier=0.1)),
        lambda: MultipliedLogits(GraniteConfig(**SMALL, logits_scaling=0.5)),
        lambda: ShiftedLogits(LlamaConfig(**SMALL)),
    ],
    ids=[
        "capped logits, tied head",
        "learned positions, tied head",
        "scaled logits",
        "head with a bias",
        "a multiplier of another name",
        "a scale that multiplies, as HyperCLOVA X does",
        "logits of a formula of their own",
    ],
)
def test_other_architectures_agree_with_their_own_forward(other):
    torch.manual_seed(0)
    model = other().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts, completions = flat(draw_rows(4))

    ours = completion_logprobs(model, prompts, completions, chunk_elements=7 * 256)
    ours_grad = gradients(model, (ours**2).sum())
    plain = plain_logprobs(model, prompts, completions)
    plain_grad = gradients(model, (plain**2).sum())

    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    for name, gradient in plain_grad.items():
        # some norms are float32 in any model, and their gradients
        torch.testing.assert_close(ours_grad[name], gradient, rtol=1e-4, atol=1e-4)


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
    prompts, completions = flat(draw_rows(3))
    for model in (adapted, base.requires_grad_(False)):
        model.get_input_embeddings().weight.requires_grad_(True)
        found = []
        for compute in (completion_logprobs, plain_logprobs):
            model.zero_grad()
            compute(model, prompts, completions).square().sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[1].items():
            torch.testing.assert_close(found[0][name], gradient, rtol=1e-9, atol=1e-9)


def test_mixed_precision_rounds_as_autocast_does():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    prompts, completions = flat(draw_rows(5))
    found = []
    for compute in (completion_logprobs, plain_logprobs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs = compute(model, prompts, completions)
        found.append((logprobs, gradients(model, logprobs.sum())))
    exact = gradients(model, plain_logprobs(model, prompts, completions).sum())

    assert found[0][0].dtype == torch.float32
    for name, gradient in exact.items():
        errors = [(one[1][name] - gradient).norm() / gradient.norm() for one in found]
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


def test_like_lengths_share_a_batch_so_little_is_padded():
    lengths = np.random.default_rng(0).lognormal(4, 1, size=2000).astype(int) + 1

    batches = length_sorted_batches(lengths.tolist(), 8192)

    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.15 * lengths.sum()


def test_a_step_smaller_than_the_budget_is_not_padded_for_nothing():
    lengths = np.random.default_rng(0).lognormal(6, 0.7, size=64).astype(int) + 1

    batches = length_sorted_batches(lengths.tolist(), 10**9)

    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.2 * lengths.sum()
    assert len(batches) < 16


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
