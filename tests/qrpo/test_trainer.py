import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from scipy.stats import norm
from transformers import AutoModelForCausalLM, AutoTokenizer

from qrpo.data.chat import encode_completion, encode_prompt
from qrpo.errors import ConfigError, DataError, TrainingError
from qrpo.method.partition import log_z
from qrpo.tiny import build_tiny_tokenizer
from qrpo.training.checkpoints import latest_checkpoint, write_marker
from qrpo.training.logprobs import score_logprobs
from qrpo.training.rows import training_rows
from qrpo.training.runs import load_policy
from qrpo.training.trainer import QRPOConfig, QRPOTrainer
from tests.support.training import Stopped, metrics, same_weights, train


@pytest.fixture(scope="module")
def rows(make_rows):
    return make_rows(12, 3)


class Reader:
    """A shard reader's interface: rows in an order that depends on the epoch, from any position."""

    def __init__(self, rows):
        self.rows = rows
        self.starts = []

    def __len__(self):
        return len(self.rows)

    def iterate(self, epoch, start=0):
        self.starts.append((epoch, start))
        for index in np.random.default_rng(epoch).permutation(len(self.rows))[start:]:
            yield self.rows[index]


@pytest.mark.parametrize(("loss_type", "error"), [("mse", np.square), ("mae", np.abs)])
def test_a_step_minimises_the_paper_s_error(folder, rows, tmp_path, loss_type, error):
    """The first loss, computed here from its definition, and descent on it."""
    quantiles = np.stack([row["quantile_reward"] for row in rows]).astype(np.float64)
    at_reference = np.mean(error(quantiles - 0.5 * log_z("identity", 0.5)))

    _, progress = train(folder, rows, tmp_path, num_train_epochs=20, prompts_per_step=12, loss_type=loss_type)

    assert progress[0]["loss"] == pytest.approx(at_reference, rel=1e-5)
    assert progress[-1]["loss"] < 0.5 * at_reference


def test_progress_metrics_and_the_final_folder(folder, rows, tmp_path):
    weights, progress = train(folder, rows, tmp_path)

    assert [(p["step"], p["total_steps"]) for p in progress] == [(1, 3), (2, 3), (3, 3)]
    expected = {"loss", "grad_norm", "learning_rate", "epoch", "log_ratio/mean", "quantile_reward"}
    assert expected | {"rewards/chosen", "rewards/margins", "tokens_per_second"} <= set(progress[-1])
    assert progress[0]["rewards/accuracies"] == 0.5
    assert metrics(tmp_path)["loss"] == [p["loss"] for p in progress]
    assert all(p["tokens_per_second"] > 0 for p in progress)
    assert progress[0]["eta_seconds"] > progress[-1]["eta_seconds"] == 0
    assert "mfu" not in progress[-1]  # a CPU's peak is not known
    (largest,) = metrics(tmp_path)["initial_log_ratio/max_abs"]
    assert largest < 1e-3
    # an ordinary model with its tokenizer
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    before = load_file(folder / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly_where_it_was(folder, rows, tmp_path):
    settings = {"num_train_epochs": 3, "save_steps": 2}
    uninterrupted, progress = train(folder, Reader(rows), tmp_path / "a", **settings)

    with pytest.raises(Stopped):
        train(folder, Reader(rows), tmp_path / "b", stop_at=5, **settings)
    (tmp_path / "b" / "checkpoint-5").mkdir()  # half written: no marker
    dataset = Reader(rows)
    resumed, rest = train(folder, dataset, tmp_path / "b", **settings)

    assert [entry["step"] for entry in rest] == [5, 6, 7, 8, 9]
    assert [entry["loss"] for entry in rest] == [entry["loss"] for entry in progress[4:]]
    assert same_weights(resumed, uninterrupted)
    assert metrics(tmp_path / "a")["loss"] == metrics(tmp_path / "b")["loss"]
    (mean,) = metrics(tmp_path / "a")["train_loss"]
    assert mean == pytest.approx(np.mean(metrics(tmp_path / "a")["loss"]))
    assert metrics(tmp_path / "b")["train_loss"] == [mean]
    assert dataset.starts[0] == (1, 4)  # one seek, no reading of what was trained on


def test_a_checkpoint_counts_only_when_it_is_complete(tmp_path):
    for step in (5, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"x" * 100)
        if step != 100:
            write_marker(tmp_path / f"checkpoint-{step}")

    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    (tmp_path / "checkpoint-20" / "weights").write_bytes(b"x" * 50)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert latest_checkpoint(tmp_path / "nothing") is None


def with_other_tokens(folder, change):
    """A row of text whose tokens come from the tokenizer after `change`; the model scored its own tokens."""

    def encode(tokenizer):
        messages = [{"role": "user", "content": "some words and more words"}]
        texts = ("more", "some words")
        return {
            "prompt_id": "asked",
            "prompt_token_ids": encode_prompt(tokenizer, messages),
            "completion_token_ids": [encode_completion(tokenizer, messages, text) for text in texts],
            "quantile_reward": [0.2, 0.9],
        }

    original, changed = AutoTokenizer.from_pretrained(folder), change(AutoTokenizer.from_pretrained(folder))
    (scores,) = score_logprobs(load_policy(folder), [encode(original)], 1000)
    return [{**encode(changed), "ref_logprob": scores}]


def another_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|assistant|>' }}", "{{ '<|assistant|>' + 'So: ' }}"
    ).replace(
        "'|>' + message['content']",
        "'|>' + ('So: ' if message['role'] == 'assistant' else '') + message['content']",
    )
    return tokenizer


def another_tokenizer(tokenizer):
    return build_tiny_tokenizer(["zebra quokka"] * 3, vocab_size=300)


def larger_tokenizer(tokenizer):
    tokenizer.add_tokens([f"more{number}" for number in range(600)] + [" words"])
    return tokenizer


def test_a_reference_of_other_weights_stops_before_the_first_step(folder, tmp_path):
    (row,) = with_other_tokens(folder, lambda tokenizer: tokenizer)
    shifted = [{**row, "ref_logprob": row["ref_logprob"] + 0.5}]

    with pytest.raises(TrainingError, match=r"before the first step.*come from other weights"):
        train(folder, shifted, tmp_path / "refused")
    train(folder, shifted, tmp_path / "allowed", max_initial_log_ratio=10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_template, r"another chat template, this one's prompts end in '<\|end\|><\|assistant\|>'"),
        (another_tokenizer, r"its \d+ tokens come from another tokenizer"),
        (larger_tokenizer, r"its token \d+ comes from another tokenizer"),
    ],
    ids=["template", "tokenizer", "larger tokenizer"],
)
def test_rows_of_another_template_or_tokenizer_stop_before_the_first_step(folder, tmp_path, change, reason):
    with pytest.raises(TrainingError, match=r"before the first step.*Prompt asked: .*" + reason):
        train(folder, with_other_tokens(folder, change), tmp_path)
    assert not (tmp_path / "final").exists()


def test_a_loss_that_is_not_finite_names_its_prompts(folder, rows, tmp_path):
    bad = [dict(row) for row in rows]
    bad[7]["quantile_reward"] = np.array([0.1, np.nan, 0.3], dtype=np.float32)

    with pytest.raises(TrainingError, match=r"not finite for these prompts: prompt-7\."):
        train(folder, bad, tmp_path)


@pytest.mark.parametrize("conversational", [False, True], ids=["strings", "messages"])
def test_trl_datasets_get_their_quantiles_and_reference_logprobs(folder, tmp_path, conversational):
    def say(role, text):
        return [{"role": role, "content": text}] if conversational else text

    texts = {"chosen": say("assistant", "some words"), "rejected": say("assistant", "more")}
    rewards = {"reward": [3.0, 1.0], "ref_rewards": [0.0, 1.0, 2.0, 4.0]}
    dataset = Dataset.from_list(
        [{"prompt": say("user", f"prompt {i}"), **texts, **rewards} for i in range(6)]
    )
    args = QRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, report_to="none", disable_tqdm=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)

    trainer = QRPOTrainer(load_policy(folder), args, dataset, tokenizer)
    row = trainer.train_dataset[0]
    trainer.train()

    np.testing.assert_allclose(row["quantile_reward"], [0.75, 0.5])
    begins = "<|begin|><|user|>prompt 0<|end|><|assistant|>" if conversational else "<|begin|>prompt 0"
    assert tokenizer.decode(row["prompt_token_ids"]) == begins
    assert tokenizer.decode(row["completion_token_ids"][1]) == "more<|end|>"
    assert trainer.state.global_step == 6
    assert trainer.state.log_history[0]["initial_log_ratio/max_abs"] < 1e-3


def test_a_completion_that_equals_every_reference_is_not_trained_on(folder, caplog):
    texts = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [{**texts, "reward": [1.0, 2.0], "ref_rewards": [1.0, 1.0]}, {**texts, "reward": [1.0, 0.0]}]
    rows[1]["ref_rewards"] = [1.0, 0.0]

    equal, other = training_rows(rows, AutoTokenizer.from_pretrained(folder))

    assert equal["reward"] == [2.0]
    assert len(equal["completion_token_ids"]) == len(equal["quantile_reward"]) == 1
    assert list(other["quantile_reward"]) == [1.0, 0.5]
    assert "1 completions are not trained on" in caplog.text


def test_trl_rows_without_reference_rewards_are_refused_by_row(folder, tmp_path):
    args = QRPOConfig(output_dir=str(tmp_path), report_to="none")
    dataset = [{"prompt": "a", "completion": "b", "reward": 1.0}]

    with pytest.raises(DataError, match="row 0 of the training dataset: no `ref_rewards`"):
        QRPOTrainer(load_policy(folder), args, dataset, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    ("transform", "partition"), [("log", "continuous"), ("logit", "finite"), ("normal-icdf", "finite")]
)
def test_transforms_and_partitions_reach_the_loss(folder, rows, tmp_path, transform, partition):
    extreme = [{**row, "quantile_reward": np.array([0.0, 1.0, 0.5])} for row in rows]
    settings = {
        "transform": transform,
        "partition": partition,
        "beta": 2.0,
        "max_steps": 2,
        "learning_rate": 1e-4,
    }

    _, progress = train(folder, extreme, tmp_path, **settings)

    assert np.isfinite([p["loss"] for p in progress]).all()


def test_mixed_precision_and_gradient_checkpointing_train(folder, rows, tmp_path):
    scores = score_logprobs(load_policy(folder), rows, 1000, dtype=torch.bfloat16)
    rounded = [{**row, "ref_logprob": score} for row, score in zip(rows, scores, strict=True)]

    weights, progress = train(folder, rounded, tmp_path, bf16=True, gradient_checkpointing=True)

    assert np.isfinite([p["loss"] for p in progress]).all()
    (mean,) = metrics(tmp_path)["initial_log_ratio/mean_abs"]
    changes = [np.abs(a["ref_logprob"] - b["ref_logprob"]) for a, b in zip(rows, rounded, strict=True)]
    assert mean < np.mean(changes)
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_a_scaled_transform_divides_each_prompt_s_spread_by_the_mean_spread(folder, rows, tmp_path):
    spreads = np.linspace(0.5, 2.0, len(rows))
    spread_rows = [
        {**row, "ref_std": float(spread), "quantile_reward": np.clip(row["quantile_reward"], 0.05, 0.95)}
        for row, spread in zip(rows, spreads, strict=True)
    ]
    settings = {"transform": "scaled-normal-icdf", "prompts_per_step": 12, "max_steps": 1}

    _, progress = train(folder, spread_rows, tmp_path, mean_ref_std=float(spreads.mean()), **settings)

    # f = scale * icdf(q), log Z = (scale / beta)^2 / 2; at the reference the log ratio is 0
    scale = (spreads / spreads.mean())[:, None]
    quantiles = np.stack([row["quantile_reward"] for row in spread_rows]).astype(np.float64)
    targets = scale * norm.ppf(quantiles) - 0.5 * (scale / 0.5) ** 2 / 2
    assert progress[0]["loss"] == pytest.approx(np.mean(targets**2), rel=1e-4)
    with pytest.raises(ConfigError, match="mean_ref_std is not set"):
        train(folder, Reader(rows), tmp_path / "streamed", **settings)
