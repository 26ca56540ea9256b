"""What a model is, and what is said where it cannot be loaded."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from qrpo.config import keyed
from qrpo.engines.vllm import require_gpu_memory
from qrpo.errors import EngineError, ModelError
from qrpo.models import (
    ModelConfig,
    context_length,
    has_float32_files,
    load_causal_lm,
    load_model_config,
    load_reward_model,
    model_identity,
)


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
    (copy / "generation_config.json").rename(copy / "generation_config.txt")
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


def test_the_context_length_comes_from_the_configuration(tiny_model: Path) -> None:
    assert context_length(config_of(tiny_model)) == 256


def test_models_load_in_the_wanted_precision(tiny_model: Path, tiny_reward_model: Path) -> None:
    assert str(load_causal_lm(config_of(tiny_model), "cpu").dtype) == "torch.float32"
    half = ModelConfig(path=str(tiny_model), dtype="bfloat16")
    model = load_causal_lm(half, "cpu")
    assert str(model.dtype) == "torch.bfloat16"
    assert not model.training
    assert load_reward_model(config_of(tiny_reward_model), "cpu").config.num_labels == 1


def test_a_language_model_is_no_reward_model(tiny_model: Path) -> None:
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
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))

    assert has_float32_files(config_of(tiny_model))
    assert not has_float32_files(config_of(copy))
    assert not has_float32_files(ModelConfig(path="org/name"))


def test_an_engine_says_how_much_memory_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (10 << 30, 80 << 30))

    with pytest.raises(EngineError, match=r"is 0\.9 of the GPU's 80\.0 GiB, but only 10\.0 GiB are free"):
        require_gpu_memory(0.9)
    require_gpu_memory(0.1)
