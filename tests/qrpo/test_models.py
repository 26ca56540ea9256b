"""What a model is, and what is said where it cannot be loaded."""

import hashlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qrpo.config import keyed
from qrpo.engines.vllm import require_gpu_memory
from qrpo.errors import ConfigError, EngineError, ModelError
from qrpo.models import (
    ModelConfig,
    check_weights,
    dtype_setting,
    has_float32_files,
    load_causal_lm,
    load_model_config,
    load_reward_model,
    model_identity,
    saved_dtype,
)
from qrpo.models.limits import model_limits
from qrpo.rewards import ModelRewardConfig
from qrpo.rewards.pooling import PoolingReward
from qrpo.tiny import build_tiny_model
from tests.support.refusals import refuses


def config_of(folder, **settings):
    return ModelConfig(path=str(folder), **settings)


@pytest.fixture
def copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def flip_the_last_bit(folder):
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))


def write(name, text):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (write(".cache", "hidden files do not count"), True),
        (write("README.md", "# A model"), True),
        (write("optimizer.pt", "0"), True),
        (write("rng_state_1.pth", "0"), True),
        (write("trainer_state.json", "{}"), True),
        (write("checkpoints/40/model.safetensors", "0"), True),
        (write("generation_config.json", '{"eos_token_id": 2, "temperature": 0.6}'), True),
        (write("generation_config.json", '{"eos_token_id": [2, 5]}'), False),
        (write("generation_config.json", "{"), False),
        (write("tokenizer_config.json", "{}"), False),
        (write("modeling_own.py", ""), False),
        (write("1_Pooling/config.json", "{}"), False),
        (write("model-00002-of-00002.safetensors", "0"), False),
        (write("sub/empty", ""), False),
        (flip_the_last_bit, False),
        (lambda folder: (folder / "chat_template.jinja").rename(folder / "renamed.txt"), False),
    ],
)
def test_a_folder_is_what_those_of_its_files_say_that_a_stage_reads(tiny_model, copy, change, same):
    before, earlier = model_identity(config_of(copy)), model_identity(config_of(copy), every_file=True)
    assert before == model_identity(config_of(tiny_model)), "its place does not count"
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    lines = [f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files]
    assert earlier == {"digest": hashlib.sha256("".join(lines).encode()).hexdigest()}
    change(copy)
    assert (model_identity(config_of(copy)) == before) is same
    hidden = (copy / ".cache").exists()
    assert (model_identity(config_of(copy), every_file=True) == earlier) is hidden


def test_a_hub_id_is_its_name_and_revision_without_a_download():
    assert model_identity(ModelConfig(path="org/name", revision="abc")) == {"hub": "org/name@abc"}
    assert model_identity(ModelConfig(path="org/name")) == {"hub": "org/name@main"}
    assert keyed(ModelConfig(path="/a/b", revision="c")) == {"dtype": "auto", "trust_remote_code": False}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/model", "no model folder /nowhere/model: fix the path"),
        ("./nowhere", "no model folder nowhere"),
        ("some/local/folder", "no model folder 'some/local/folder'.*a hub id is org/name"),
    ],
)
def test_a_missing_folder_says_so(path, message):
    for load in (model_identity, load_causal_lm):
        refuses(ModelError, message, load, ModelConfig(path=path))


def test_what_cannot_be_loaded_says_why(copy):
    message = r"cannot load its configuration from org/nothing.*check the id and revision"
    refuses(ModelError, message, load_model_config, ModelConfig(path="org/nothing"))
    (copy / "model.safetensors").unlink()
    refuses(ModelError, r"cannot load its weights from .*fix the folder", load_causal_lm, config_of(copy))
    (copy / "model.safetensors").write_bytes(b"cut off")
    refuses(ModelError, "cannot load its weights", load_causal_lm, config_of(copy))
    (copy / "config.json").write_text("{")
    message = r"cannot load its configuration.*not a valid JSON file\. Remedy"
    refuses(ModelError, message, load_model_config, config_of(copy))
    (copy / "adapter_config.json").write_text("{}")
    refuses(ModelError, r"holds an adapter .*merge_and_unload", model_identity, config_of(copy))


def copy_of(folder, to, edit=lambda weights: None, **config):
    """A copy whose weights `edit` changed, and whose `config.json` has other values."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    edit(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    changed = json.loads((to / "config.json").read_text()) | config
    changed = {name: value for name, value in changed.items() if value != "removed"}
    (to / "config.json").write_text(json.dumps(changed))
    return config_of(to)


HEAD, LAYER = "score.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("reward", "edit", "message"),
    [
        (True, lambda w: w.update({"v_head": w.pop(HEAD)}), "missing .* random: score.weight; unused: v_head"),
        (True, lambda w: w.update({"v_head.summary.bias": w[HEAD][:, 0].clone()}), "unused: v_head.summary.bias"),
        (True, lambda w: w.update({HEAD: torch.ones(3, 64)}), r"shape: score.weight \(3, 64\), expected \(1, 64\)"),
        (False, lambda w: w.pop(LAYER), f"missing .*: {LAYER}"),
        (False, lambda w: w.update({HEAD: torch.ones(1, 64)}), "unused: score.weight"),
        (False, lambda w: w.pop("lm_head.weight"), "missing .*: lm_head.weight"),
        (False, lambda w: w.update({f"x.{n}": torch.ones(1) for n in range(7)}), r"unused: x\.0, .* and 2 more"),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_files_are_refused_by_name(
    tiny_model, tiny_reward_model, tmp_path, reward, edit, message
):
    model = copy_of(tiny_reward_model if reward else tiny_model, tmp_path / "model", edit)
    refuses(ModelError, message, load_reward_model if reward else load_causal_lm, model, "cpu")
    refuses(ModelError, message, check_weights, model, reward=reward)


def test_tied_heads_buffers_and_a_reward_models_language_head_are_no_such_weights(
    tiny_reward_model, tmp_path
):
    tied = config_of(build_tiny_model(tmp_path / "tied", ["some text"], hidden_size=16, layers=1, tied=True))
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    extra["lm_head.weight"] = torch.ones(9, 64)
    reward = copy_of(tiny_reward_model, tmp_path / "reward", lambda weights: weights.update(extra))
    load_causal_lm(tied, "cpu")
    check_weights(tied)
    load_reward_model(reward, "cpu")
    check_weights(reward, reward=True)


@pytest.mark.parametrize(
    ("stated", "weights", "in_fingerprint"),
    [
        ("float32", torch.float32, "auto"),
        ("removed", torch.float32, "float32"),
        ("removed", torch.bfloat16, "bfloat16"),
        ("bfloat16", torch.float32, "float32"),
    ],
)
def test_the_precision_is_that_of_the_weights(tiny_model, tmp_path, stated, weights, in_fingerprint):
    def narrow(tensors):
        tensors.update({name: tensor.to(weights) for name, tensor in tensors.items()})
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # one of another precision

    model = copy_of(tiny_model, tmp_path / "model", narrow, dtype=stated)
    assert f"torch.{saved_dtype(model)}" == str(load_causal_lm(model, "cpu").dtype) == str(weights)
    assert has_float32_files(model) == (weights == torch.float32)
    assert dtype_setting(model, unstated_is_saved=False) == in_fingerprint
    if stated == "removed":
        assert dtype_setting(model, unstated_is_saved=True) == "auto"
    half = load_causal_lm(model.model_copy(update={"dtype": "bfloat16"}), "cpu")
    assert half.dtype == torch.bfloat16
    assert not half.training
    assert not has_float32_files(ModelConfig(path="org/name"))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
BEFORE = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 256),
        ({"rope_parameters": {**YARN, BEFORE: 256}}, 1024),
        ({"rope_parameters": {**YARN, BEFORE: 64}}, 256),  # stated after the extension
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, BEFORE: 256}}, 1024),
        ({"rope_parameters": LINEAR}, 512),
        ({"rope_parameters": LINEAR, "model_type": "gemma3_text"}, 256),
        ({"rope_parameters": {**LINEAR, "rope_type": "llama3"}}, 256),
        ({"model_type": "roberta", "pad_token_id": 1}, 254),
        ({"max_position_embeddings": "removed", "model_type": "gpt2", "n_positions": 128}, 128),
    ],
)
def test_the_context_length_comes_from_the_configuration(tiny_model, tmp_path, changes, length):
    model = copy_of(tiny_model, tmp_path / "model", **changes)
    assert model_limits(model).max_length == length
    assert model_limits(model, length, "max_length").max_length == length
    message = f"max_length: got {length + 1}, but .* context of {length} tokens"
    refuses(ConfigError, message, model_limits, model, length + 1, "max_length")


def test_a_language_model_is_no_reward_model(tiny_model, tiny_reward_model):
    message, model = "is a LlamaForCausalLM, expected a sequence-classification", config_of(tiny_model)
    refuses(ModelError, message, PoolingReward, ModelRewardConfig(model=model, engine="vllm"))
    refuses(ModelError, message, load_reward_model, model)
    assert load_reward_model(config_of(tiny_reward_model), "cpu").config.num_labels == 1


def test_own_code_that_does_not_run_is_said(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "modeling_own.py").write_text("from transformers import NoLongerThere\n")
    message = r"Python code of .* does not run with .*ImportError.*NoLongerThere"
    refuses(ModelError, message, load_causal_lm, config_of(copy, trust_remote_code=True))


def test_an_engine_says_how_much_memory_it_lacks(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (10 << 30, 80 << 30))
    message = r"is 0\.9 of the GPU's 80\.0 GiB, but only 10\.0 GiB are free"
    refuses(EngineError, message, require_gpu_memory, 0.9)
    require_gpu_memory(0.1)
