"""LoRA, held-out loss, early stop, and what is reported."""

import numpy as np
import polars
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qrpo.errors import ConfigError
from qrpo.training.adapters import adapters_off, with_lora
from qrpo.training.logprobs import score_logprobs
from qrpo.training.ranks import number_of_processes
from qrpo.training.runs import load_policy
from qrpo.training.settings import LoraConfig, PolicyConfig
from qrpo.training.throughput import PEAK_BF16, Meter
from qrpo.training.trainer import QRPOConfig, QRPOTrainer
from qrpo.training.trainer_arguments import training_arguments
from tests.support.refusals import refuses
from tests.support.training import Stopped, metrics, same_weights, train


@pytest.fixture(scope="module")
def rows(make_rows):
    return make_rows(16, 2)


@pytest.mark.slow
def test_lora_learns_and_is_saved_as_an_ordinary_model_whose_log_probabilities_are_the_policy_s(
    folder, rows, tmp_path
):
    lora = {"rank": 8, "alpha": 16, "dropout": 0.1}
    weights, progress = train(folder, rows, tmp_path, lora=lora, num_train_epochs=20, prompts_per_step=16)
    before = load_file(folder / "model.safetensors")

    assert progress[-1]["loss"] < 0.7 * progress[0]["loss"]
    changed = {name for name in before if not torch.equal(before[name], weights[name])}
    assert weights.keys() == before.keys()
    assert changed == {name for name in before if "_proj" in name}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    scores = np.stack(list(score_logprobs(model, rows, 1000)))
    references = np.stack([row["ref_logprob"] for row in rows])
    quantiles = np.stack([row["quantile_reward"] for row in rows])
    gained = (scores - references)[quantiles > 0.7].mean() - (scores - references)[quantiles < 0.3].mean()
    assert gained > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["all weights", "adapters"])
def test_models_on_the_way_are_those_of_runs_that_ended_there(folder, rows, tmp_path, lora):
    lora = lora and {**lora, "target_modules": ("q_proj", "v_proj")}
    settings = {"lora": lora, "num_train_epochs": 2, "save_steps": 3}

    plain, _ = train(folder, rows, tmp_path / "plain", **settings)
    with pytest.raises(Stopped):
        train(folder, rows, tmp_path / "kept", checkpoint_steps=2, stop_at=5, **settings)
    assert (tmp_path / "kept" / "checkpoint-3" / "adapter_model.safetensors").is_file() == bool(lora)
    kept, rest = train(folder, rows, tmp_path / "kept", checkpoint_steps=2, **settings)

    assert rest[0]["step"] == 4, "it goes on from its checkpoint"
    assert {path.name for path in (tmp_path / "kept" / "checkpoints").iterdir()} == {"2", "4", "6", "8"}
    short, _ = train(folder, rows, tmp_path / "short", max_steps=4, **settings)
    for weights, step in ((short, "4"), (kept, "8")):
        model = load_file(tmp_path / "kept" / "checkpoints" / step / "model.safetensors")
        assert same_weights(model, weights)
    assert same_weights(kept, plain), "keeping models changed the training"
    AutoTokenizer.from_pretrained(tmp_path / "kept" / "checkpoints" / "4")


def test_the_reference_of_a_trained_adapter_is_the_base_model(folder, tmp_path):
    texts = {"prompt": "some", "chosen": " words", "rejected": " and"}
    dataset = [{**texts, "reward": [1.0, 0.0], "ref_rewards": [0.5, 0.7]}]
    base = load_policy(folder)
    model = with_lora(load_policy(folder), LoraConfig(rank=2), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    args = QRPOConfig(output_dir=str(tmp_path), report_to="none")

    trainer = QRPOTrainer(model, args, dataset, AutoTokenizer.from_pretrained(folder))

    row = trainer.train_dataset[0]
    (expected,) = score_logprobs(base, [row], 100)
    (adapted,) = score_logprobs(model, [row], 100)
    np.testing.assert_allclose(row["ref_logprob"], expected, rtol=1e-5)
    assert np.abs(adapted - expected).min() > 0.01
    with adapters_off(base):
        np.testing.assert_allclose(next(score_logprobs(base, [row], 100)), expected)


def test_the_held_out_loss_is_that_of_the_definition_and_is_reported_at_its_steps(folder, rows, tmp_path):
    settings = {"eval_fraction": 0.5, "eval_steps": 2, "num_train_epochs": 2, "learning_rate": 1e-9}
    _, progress = train(folder, rows[:8], tmp_path, eval_rows=rows[8:], **settings)

    table = polars.read_parquet(tmp_path / "metrics.parquet")
    reported = table.filter(polars.col("eval_loss").is_not_null())
    assert reported["step"].to_list() == [2, 4]
    _, alone = train(folder, rows[8:], tmp_path / "alone", prompts_per_step=8)
    assert reported["eval_loss"][0] == pytest.approx(alone[0]["loss"], rel=1e-4)
    assert "eval_rewards/accuracies" in reported.columns
    assert len(progress) == 4


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["all weights", "adapters"])
def test_training_stops_when_the_held_out_loss_no_longer_falls_and_goes_back_to_the_best(
    folder, rows, tmp_path, lora
):
    """Of few rows the loss falls to nothing, and that of the others rises in the end; saved at every tenth step alone."""
    evaluated = {"eval_rows": rows[4:], "eval_fraction": 0.5, "eval_steps": 1, "patience": 3, "lora": lora}
    settings = {**evaluated, "num_train_epochs": 60, "save_steps": 10, "learning_rate": 0.02}
    best, progress = train(folder, rows[:4], tmp_path / "a", **settings)

    losses = metrics(tmp_path / "a")["eval_loss"]
    assert progress[-1]["step"] == len(losses) < 60
    assert losses.index(min(losses)) == len(losses) - 4, "the best, and three that were no better"
    _, again = train(
        tmp_path / "a" / "final", rows[4:], tmp_path / "b", max_initial_log_ratio=1e9, prompts_per_step=12
    )
    assert again[0]["loss"] == pytest.approx(min(losses), rel=1e-4)
    with pytest.raises(Stopped):
        train(folder, rows[:4], tmp_path / "c", stop_at=len(losses) - 1, **settings)
    (tmp_path / "c").rename(tmp_path / "moved")
    resumed, rest = train(folder, rows[:4], tmp_path / "moved", **settings)
    assert rest[-1]["step"] == len(losses), "a resumed run stops where the other did"
    assert same_weights(resumed, best), "and goes back to the same step, wherever its folder is now"


def test_operations_are_counted_for_trained_and_frozen_weights_and_the_head_on_completions_only(
    folder, monkeypatch
):
    model = load_policy(folder)
    head, embedding = model.lm_head.weight.numel(), model.model.embed_tokens.weight.numel()
    body = sum(parameter.numel() for parameter in model.parameters()) - head - embedding
    monkeypatch.setattr("qrpo.training.throughput._peak", lambda device, dtype: PEAK_BF16["H100"])

    def used(model):
        meter = Meter(model, torch.bfloat16)
        meter.start(0)
        meter.add(100, 30)
        seen = meter.read(1, 10, processes=2)
        return seen["mfu"] * PEAK_BF16["H100"] / (seen["tokens_per_second"] / 200)

    assert used(model) == pytest.approx(6 * (100 * body + 30 * head))
    model.model.requires_grad_(False)
    assert used(model) == pytest.approx(4 * 100 * body + 6 * 30 * head)


def test_saved_weights_keep_what_training_changed(folder, rows, tmp_path, caplog):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(folder).save_pretrained(half)
    scores = score_logprobs(load_policy(half), rows, 1000)
    rows = [{**row, "ref_logprob": score} for row, score in zip(rows, scores, strict=True)]
    settings = {"learning_rate": 1e-6, "checkpoint_steps": 2}
    saved = {
        dtype: train(half, rows, tmp_path / dtype, save_dtype=dtype, **settings)[0]
        for dtype in ("float32", "auto", "bfloat16")
    }

    assert same_weights(saved["auto"], saved["float32"])
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        for place in ("final", "checkpoints/2"):
            assert AutoConfig.from_pretrained(tmp_path / name / place).dtype == dtype
    assert {weight.dtype for weight in saved["bfloat16"].values()} == {torch.bfloat16}
    trained, rounded = (
        np.stack(list(score_logprobs(load_policy(tmp_path / name / "final"), rows, 1000)))
        for name in ("auto", "bfloat16")
    )
    measured = metrics(tmp_path / "auto")
    lost, learned = measured["saved_log_ratio/mean_abs"][-1], measured["learned_log_ratio/mean_abs"][-1]
    assert lost == pytest.approx(np.abs(rounded - trained).mean(), rel=0.05)
    assert learned == pytest.approx(np.abs(trained - np.stack(scores_of(rows))).mean(), rel=0.05)
    assert lost > 0.2 * learned
    assert len(measured["loss"]) == 4, "every step is logged, also those whose model is kept"
    assert "saved in bfloat16; set save_dtype to `float32`" in caplog.text


def scores_of(rows):
    return [row["ref_logprob"] for row in rows]


def test_adapters_that_cannot_be_trained_are_refused(folder, rows, tmp_path):
    missing = LoraConfig(target_modules=("no_such_layer",))
    message = r"policy\.lora\.target_modules: .*no_such_layer"
    refuses(ConfigError, message, with_lora, load_policy(folder), missing, seed=0)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    for name in ("lm_head", "embed_tokens"):
        with_lora(load_policy(folder), LoraConfig(target_modules=(name,)), seed=0)
        tied, both = AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=(name, "q_proj"))
        refuses(ConfigError, "head or the embedding, which have one weight", with_lora, tied, both, seed=0)
    model = get_peft_model(load_policy(folder), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    arguments = QRPOConfig(output_dir=str(tmp_path), report_to="none")
    message = "type PROMPT_TUNING, which adds virtual tokens"
    refuses(ConfigError, message, QRPOTrainer, model, arguments, rows)


def test_weights_too_coarse_to_move_are_warned_of(folder, rows, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    QRPOTrainer(model, QRPOConfig(output_dir=str(tmp_path), report_to="none"), rows)

    assert "at a learning rate of 1e-06, 98% of the weights in bfloat16 stay as they are" in caplog.text


@pytest.mark.slow
def test_weights_in_bfloat16_with_float32_copies_learn_what_float32_weights_learn(folder, rows, tmp_path):
    """200 steps in the same precision of matrix products; without copies the small steps would be lost."""
    scores = score_logprobs(load_policy(folder), rows, 1000, dtype=torch.bfloat16)
    rows = [{**row, "ref_logprob": score} for row, score in zip(rows, scores, strict=True)]
    settings = {"bf16": True, "learning_rate": 3e-5, "max_steps": 200, "prompts_per_step": 16}
    settings |= {"token_budget": 4096, "save_steps": 200}
    runs = {
        name: [entry["loss"] for entry in train(folder, rows, tmp_path / name, weights=name, **settings)[1]]
        for name in ("float32", "bfloat16")
    }

    losses = {name: np.array(run) for name, run in runs.items()}
    learned = losses["float32"][0] - losses["float32"][-1]
    assert learned > 0.2 * losses["float32"][0]
    assert np.abs(losses["bfloat16"] - losses["float32"]).max() < 0.1 * learned
    settings |= {"weights": "bfloat16", "max_steps": 8, "save_steps": 4}
    whole, _ = train(folder, rows, tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        train(folder, rows, tmp_path / "stopped", stop_at=6, **settings)
    resumed, rest = train(folder, rows, tmp_path / "stopped", **settings)
    assert rest[0]["step"] == 5
    assert same_weights(resumed, whole)
    with pytest.raises(ValueError, match="weights: bfloat16 needs bf16: true, and one process"):
        PolicyConfig(weights="bfloat16")


def test_one_process_uses_one_device_and_shards_nothing(folder, rows, tmp_path):
    arguments = QRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, report_to="none")
    arguments._n_gpu = 8  # as where one process sees eight GPUs
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
    arguments = QRPOConfig(output_dir=str(tmp_path), fsdp=True, report_to="none")
    with pytest.raises(ConfigError, match="fsdp shards a model over several processes, and there is one"):
        QRPOTrainer(load_policy(folder), arguments, rows)
    assert training_arguments(PolicyConfig(fsdp=True), tmp_path).fsdp is None


@pytest.mark.parametrize(
    ("processes", "gpus", "expected"),
    [("auto", 0, 1), ("auto", 8, 8), ("auto", 5, 4), (3, 8, 3)],
)
def test_every_visible_gpu_trains_if_it_gets_prompts(monkeypatch, processes, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert number_of_processes(PolicyConfig(processes=processes, prompts_per_step=72)) == expected


def test_rows_without_completions_are_skipped(folder, rows, tmp_path):
    names = ("completion_token_ids", "ref_logprob", "quantile_reward", "reward")
    empty = [{**row, **{name: row[name][:0] for name in names}} for row in rows[:6]]
    _, progress = train(folder, empty + rows[6:8], tmp_path, prompts_per_step=1)

    assert len(progress) == 8
    assert sum(entry["loss"] == 0 for entry in progress) == 6


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"loss": "foo"}, "loss: Input should be 'qrpo', 'dpo', 'rebel', 'simpo' or 'sft', got 'foo'"),
        ({"pairs": "x"}, "pairs: "),
        ({"bad_step": "x"}, "bad_step: "),
        ({"partition": "x"}, "partition: "),
        ({"loss_type": "x"}, "loss_type: "),
        ({"rebel_reward": "x"}, "rebel_reward: "),
        ({"beta": 0.0}, "beta: Input should be greater than 0"),
        ({"beta": float("inf")}, "beta: Input should be a finite number"),
        ({"token_budget": 0}, "token_budget: "),
        ({"patience": "2"}, "patience: Input should be a valid integer"),
    ],
)
def test_the_library_refuses_what_the_yaml_file_refuses(setting, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        QRPOConfig(output_dir=str(tmp_path), **setting)
