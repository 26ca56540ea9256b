"""The memory of training, from a model's configuration alone."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qrpo.errors import ConfigError
from qrpo.models import ModelConfig
from qrpo.training.memory import needs_checkpointing, planned_memory, training_memory
from qrpo.training.settings import PolicyConfig
from tests.support.refusals import refuses

GIB = 2**30
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256},
}
HEADS = {"1b": (32, 8, True), "70b": (64, 8, False)}


def llama(size):
    heads, groups, tied = HEADS[size]
    attention = {"num_attention_heads": heads, "num_key_value_heads": groups, "tie_word_embeddings": tied}
    return LlamaConfig(**SHAPES[size], **attention)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with the configuration of a Llama of 70B alone."""
    folder = tmp_path_factory.mktemp("70b")
    llama("70b").save_pretrained(folder)
    return ModelConfig(path=str(folder))


def test_the_estimate_is_near_what_was_measured_on_a_gpu():
    with torch.device("meta"):
        model = LlamaForCausalLM(llama("1b"))
    for checkpointing, measured in ((False, 39.7), (True, 22.7)):  # GiB on one H200, bf16 autocast
        estimate = training_memory(model, 8192, checkpointing=checkpointing).total / GIB
        assert abs(estimate / measured - 1) < 0.1
    assert not needs_checkpointing(model, 8192, torch.device("cpu"))


def test_a_70b_model_is_planned_without_its_weights_and_refused_where_it_does_not_fit(large):
    width, inner, layers, words = (SHAPES["70b"][name] for name in SHAPES["70b"])
    attention = width * (2 * width + 2 * width * 8 // 64)
    norms = (2 * layers + 1) * width
    count = layers * (attention + 3 * width * inner) + 2 * words * width + norms
    assert count == 70_553_706_496
    sharded = PolicyConfig(fsdp=True, processes=32, prompts_per_step=128, bf16=True, token_budget=8192)

    planned = planned_memory(large, sharded, 32, 80 * GIB)

    assert (planned.weights, planned.gradients, planned.optimizer) == (count // 8, count // 8, count // 4)
    assert planned.activations == 8192 * (4 * layers * width + 2 * (12 * width + 6 * inner))
    message = r"needs 28\d\.\d GiB \(weights 65\.7 \+ gradients 65\.7 \+ optimizer 131\.4 \+ activations"
    refuses(
        ConfigError,
        message + r".* on each of 4 GPUs, which has 80\.0 GiB: shard it",
        planned_memory,
        large,
        sharded.model_copy(update={"processes": 4}),
        4,
        80 * GIB,
    )
    refuses(ConfigError, "on one GPU", planned_memory, large, PolicyConfig(), 1, 80 * GIB)
    half = PolicyConfig(bf16=True, weights="bfloat16", lora={"rank": 8}, optim="sgd", token_budget=1024)
    adapted = planned_memory(large, half, 1, 200 * GIB)
    assert adapted.weights == pytest.approx(2 * count, rel=0.01)
    assert (adapted.gradients, adapted.optimizer) == (pytest.approx(4 * 103_546_880), 0)
