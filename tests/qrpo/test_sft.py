import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qrpo.errors import ConfigError, DataError
from qrpo.training.runs import settle_generation_config, train_policy
from qrpo.training.settings import SftConfig

SETTINGS = {"learning_rate": 1e-2, "prompts_per_step": 4, "warmup_steps": 0.0, "token_budget": 64}


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, 250, size=rng.integers(2, 9)).tolist() for _ in range(10)]
    return [
        {"prompt_id": f"p{i}", "prompt_token_ids": ids, "completion_token_ids": [[*reversed(ids), 2]]}
        for i, ids in enumerate(prompts)
    ]


def test_the_loss_is_the_mean_over_the_steps_completion_tokens(folder, rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = count = 0
    for row in rows:
        ids = torch.tensor([row["prompt_token_ids"] + row["completion_token_ids"][0]])
        labels = ids.clone()
        labels[:, : len(row["prompt_token_ids"])] = -100
        tokens = len(row["completion_token_ids"][0])
        total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    progress, config = [], SftConfig(**SETTINGS | {"prompts_per_step": 10})

    train_policy(folder, rows, config, tmp_path, on_progress=progress.append)

    assert progress[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_model_learns_the_answers(folder, rows, tmp_path):
    progress = []

    config = SftConfig(**SETTINGS | {"learning_rate": 2e-2}, num_train_epochs=40)
    final = train_policy(folder, rows, config, tmp_path, on_progress=progress.append)

    assert progress[-1]["loss"] < 0.1 < progress[0]["loss"]
    assert progress[-1]["total_steps"] == 120
    model = AutoModelForCausalLM.from_pretrained(final)
    prompt = torch.tensor([rows[0]["prompt_token_ids"]])
    expected = rows[0]["completion_token_ids"][0]
    limits = {"max_new_tokens": len(expected), "do_sample": False}
    answer = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **limits)
    assert answer[0, prompt.shape[1] :].tolist() == expected


def test_the_saved_generation_config_ends_at_the_turns_end_and_can_be_saved(folder, rows, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    template = (model / "chat_template.jinja").read_text().replace("eos_token", "'<|system|>'")
    (model / "chat_template.jinja").write_text(template)
    # as Llama 2 and Vicuna have it
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9}')
    config = SftConfig(**SETTINGS, max_steps=1)

    final = train_policy(model, rows, config, tmp_path / "run")

    saved = GenerationConfig.from_pretrained(final)
    assert saved.eos_token_id == [
        2,
        AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|system|>"),
    ]
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)
    broken = AutoModelForCausalLM.from_pretrained(folder)
    broken.generation_config.max_new_tokens = -1
    with pytest.raises(ConfigError, match=r"could not be saved after the training: .*max_new_tokens"):
        settle_generation_config(broken, None)


def test_weights_keep_the_precision_they_came_in(folder, rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "half" / name).write_bytes((folder / name).read_bytes())

    final = train_policy(tmp_path / "half", rows, SftConfig(**SETTINGS), tmp_path / "run")

    assert {weight.dtype for weight in load_file(final / "model.safetensors").values()} == {torch.bfloat16}


def test_no_rows_is_an_error_that_says_where_to_look(folder, tmp_path):
    with pytest.raises(DataError, match="no rows to train on"):
        train_policy(folder, [], SftConfig(), tmp_path)
