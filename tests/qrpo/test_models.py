"""What a model is, and what is said where it cannot be loaded."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from qrpo.models.limits import context_length, model_limits
from qrpo.rewards import ModelRewardConfig
from qrpo.rewards.pooling import PoolingReward
from qrpo.tiny import build_tiny_model


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder))


def test_a_folder_is_what_its_files_say(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, copy)
    assert model_identity(config_of(copy)) == model_identity(config_of(tiny_model))
    (copy / ".cache").write_text("hidden files do not count")
    assert model_identity(config_of(copy)) == model_identity(config_of(tiny_model))
    with (copy / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert model_identity(config_of(copy)) != model_identity(config_of(tiny_model))


def test_a_renamed_or_added_file_is_another_model(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    (copy / "chat_template.jinja").rename(copy / "chat_template.txt")
    renamed = model_identity(config_of(copy))
    (copy / "sub").mkdir()
    (copy / "sub" / "empty").touch()
    identities = [model_identity(config_of(tiny_model)), renamed, model_identity(config_of(copy))]
    assert len({json.dumps(identity) for identity in identities}) == 3


def test_a_file_that_is_written_again_is_read_again(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    before = model_identity(config_of(copy))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))  # the same size
    assert model_identity(config_of(copy)) != before


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        ("README.md", "# A model", True),
        ("optimizer.pt", "0", True),
        ("rng_state_1.pth", "0", True),
        ("trainer_state.json", "{}", True),
        ("checkpoints/40/model.safetensors", "0", True),
        ("generation_config.json", '{"eos_token_id": 2, "temperature": 0.6}', True),
        ("generation_config.json", '{"eos_token_id": [2, 5]}', False),
        ("generation_config.json", "{", False),
        ("tokenizer_config.json", "{}", False),
        ("modeling_own.py", "", False),
        ("1_Pooling/config.json", "{}", False),
        ("model-00002-of-00002.safetensors", "0", False),
    ],
)
def test_files_that_no_stage_reads_do_not_count(
    tiny_model: Path, tmp_path: Path, name: str, text: str, same: bool
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    before, earlier = model_identity(config_of(copy)), model_identity(config_of(copy), every_file=True)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    lines = [f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files]
    assert earlier == {"digest": hashlib.sha256("".join(lines).encode()).hexdigest()}
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text(text)
    assert (model_identity(config_of(copy)) == before) is same
    assert model_identity(config_of(copy), every_file=True) != earlier


def test_a_hub_id_is_its_name_and_revision_without_a_download() -> None:
    assert model_identity(ModelConfig(path="org/name", revision="abc")) == {"hub": "org/name@abc"}
    assert model_identity(ModelConfig(path="org/name")) == {"hub": "org/name@main"}


def test_path_and_revision_are_left_to_the_identity() -> None:
    assert keyed(ModelConfig(path="/a/b", revision="c")) == {"dtype": "auto", "trust_remote_code": False}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/model", "no model folder /nowhere/model: fix the path"),
        ("./nowhere", "no model folder nowhere"),
        ("some/local/folder", "no model folder 'some/local/folder'.*a hub id is org/name"),
    ],
)
def test_a_missing_folder_says_so(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_identity(ModelConfig(path=path))
    with pytest.raises(ModelError, match=message):
        load_causal_lm(ModelConfig(path=path))


def test_a_hub_id_that_cannot_be_reached_says_what_to_check() -> None:
    with pytest.raises(
        ModelError, match=r"cannot load its configuration from org/nothing.*check the id and revision"
    ):
        load_model_config(ModelConfig(path="org/nothing"))


def test_damaged_folders_say_so(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot load its weights from .*fix the folder"):
        load_causal_lm(config_of(copy))
    (copy / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="cannot load its weights"):
        load_causal_lm(config_of(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot load its configuration.*not a valid JSON file\. Remedy"):
        load_model_config(config_of(copy))


def copy_of(folder: Path, to: Path, edit: Callable[[dict[str, Any]], Any], **config: Any) -> ModelConfig:
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
    tiny_model: Path, tiny_reward_model: Path, tmp_path: Path, reward: bool, edit: Any, message: str
) -> None:
    model = copy_of(tiny_reward_model if reward else tiny_model, tmp_path / "model", edit)
    load = load_reward_model if reward else load_causal_lm
    with pytest.raises(ModelError, match=message):
        load(model, "cpu")
    with pytest.raises(ModelError, match=message):
        check_weights(model, reward=reward)


def test_tied_heads_buffers_and_a_reward_models_language_head_are_no_such_weights(
    tiny_reward_model: Path, tmp_path: Path
) -> None:
    tied = config_of(build_tiny_model(tmp_path / "tied", ["some text"], hidden_size=16, layers=1, tied=True))
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": torch.ones(9, 64),
    }
    reward = copy_of(tiny_reward_model, tmp_path / "reward", lambda weights: weights.update(extra))
    load_causal_lm(tied, "cpu")
    check_weights(tied)
    load_reward_model(reward, "cpu")
    check_weights(reward, reward=True)


def test_an_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_model, tmp_path / "model", lambda weights: None)
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter .*merge_and_unload"):
        model_identity(model)


@pytest.mark.parametrize(
    ("stated", "weights", "loaded", "in_fingerprint"),
    [
        ("float32", torch.float32, "float32", "auto"),
        ("removed", torch.float32, "float32", "float32"),
        ("removed", torch.bfloat16, "bfloat16", "bfloat16"),
        ("bfloat16", torch.float32, "float32", "float32"),
    ],
)
def test_the_precision_is_that_of_the_weights(
    tiny_model: Path, tmp_path: Path, stated: str, weights: torch.dtype, loaded: str, in_fingerprint: str
) -> None:
    def narrow(tensors: dict[str, Any]) -> None:
        tensors.update({name: tensor.to(weights) for name, tensor in tensors.items()})
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # one of another precision

    model = copy_of(tiny_model, tmp_path / "model", narrow, dtype=stated)
    assert saved_dtype(model) == loaded
    assert str(load_causal_lm(model, "cpu").dtype) == f"torch.{loaded}"
    assert dtype_setting(model, unstated_is_saved=False) == in_fingerprint
    if stated == "removed":
        assert dtype_setting(model, unstated_is_saved=True) == "auto"


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 256),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 256}}, 1024),
        (
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}},
            256,
        ),  # stated after the extension
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}, 1024),
        ({"rope_parameters": LINEAR}, 512),
        ({"rope_parameters": LINEAR, "model_type": "gemma3_text"}, 256),
        ({"rope_parameters": {**LINEAR, "rope_type": "llama3"}}, 256),
        ({"model_type": "roberta", "pad_token_id": 1}, 254),
        ({"max_position_embeddings": "removed", "model_type": "gpt2", "n_positions": 128}, 128),
    ],
)
def test_the_context_length_comes_from_the_configuration(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], length: int
) -> None:
    model = copy_of(tiny_model, tmp_path / "model", lambda weights: None, **changes)
    assert context_length(model) == length
    assert model_limits(model, length, "max_length").max_length == length
    with pytest.raises(ConfigError, match=f"max_length: got {length + 1}, but .* context of {length} tokens"):
        model_limits(model, length + 1, "max_length")


def test_models_load_in_the_wanted_precision(tiny_model: Path, tiny_reward_model: Path) -> None:
    assert str(load_causal_lm(config_of(tiny_model), "cpu").dtype) == "torch.float32"
    half = ModelConfig(path=str(tiny_model), dtype="bfloat16")
    model = load_causal_lm(half, "cpu")
    assert str(model.dtype) == "torch.bfloat16"
    assert not model.training
    assert load_reward_model(config_of(tiny_reward_model), "cpu").config.num_labels == 1


def test_a_language_model_is_no_reward_model(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="is a LlamaForCausalLM, expected a sequence-classification"):
        PoolingReward(ModelRewardConfig(model=config_of(tiny_model), engine="vllm"))
    with pytest.raises(ModelError, match="is a LlamaForCausalLM, expected a sequence-classification"):
        load_reward_model(config_of(tiny_model))


def test_own_code_that_does_not_run_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    copy = tmp_path / "own"
    shutil.copytree(tiny_model, copy)
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "modeling_own.py").write_text("from transformers import NoLongerThere\n")

    with pytest.raises(ModelError, match=r"Python code of .* does not run with .*ImportError.*NoLongerThere"):
        load_causal_lm(ModelConfig(path=str(copy), trust_remote_code=True))


def test_files_in_float32_are_known_without_the_hub(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "half"
    shutil.copytree(tiny_model, copy)
    weights = load_file(copy / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, copy / "model.safetensors")

    assert has_float32_files(config_of(tiny_model))
    assert not has_float32_files(config_of(copy))
    assert not has_float32_files(ModelConfig(path="org/name"))


def test_an_engine_says_how_much_memory_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (10 << 30, 80 << 30))

    with pytest.raises(EngineError, match=r"is 0\.9 of the GPU's 80\.0 GiB, but only 10\.0 GiB are free"):
        require_gpu_memory(0.9)
    require_gpu_memory(0.1)
