"""The trainer on each of its losses: the value that it starts from, and that how a step is cut changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from qrpo.config import keyed
from qrpo.errors import DataError
from qrpo.training.runs import load_policy
from qrpo.training.settings import PolicyConfig
from qrpo.training.trainer import QRPOConfig, QRPOTrainer
from qrpo.training.trainer_arguments import training_arguments
from tests.support.training import SETTINGS, train


@pytest.fixture(scope="module")
def rows(make_rows):
    """12 prompts with 3 completions each; all rewards of the third prompt are equal."""
    rows = make_rows(12, 3)
    rows[2]["reward"] = np.ones(3, np.float32)
    return rows


def losses_of(folder, rows, output, **settings):
    _, progress = train(folder, rows, output, **{"prompts_per_step": 12, **settings})
    return [entry["loss"] for entry in progress]


def chosen_and_rejected(rows, values):
    """Of each prompt whose rewards differ, the value of its best and of its worst completion."""
    pairs = [(values[i], row["reward"]) for i, row in enumerate(rows) if len(set(row["reward"].tolist())) > 1]
    return tuple(
        np.array([value[pick(reward)] for value, reward in pairs], float) for pick in (np.argmax, np.argmin)
    )


def first_rebel(regressed):
    def expected(rows):
        chosen, rejected = chosen_and_rejected(rows, [row[regressed] for row in rows])
        return np.mean(((chosen - rejected) / 0.5) ** 2)

    return expected


def first_simpo(rows):
    means = [row["ref_logprob"] / [len(ids) for ids in row["completion_token_ids"]] for row in rows]
    chosen, rejected = chosen_and_rejected(rows, means)
    return np.mean(np.logaddexp(0, 0.5 * (0.25 - (chosen - rejected))))


def first_sft(rows):
    best = [int(np.argmax(row["reward"])) for row in rows]
    total = sum(row["ref_logprob"][k] for row, k in zip(rows, best, strict=True))
    return -total / sum(len(row["completion_token_ids"][k]) for row, k in zip(rows, best, strict=True))


@pytest.mark.parametrize(
    ("settings", "first", "falls_to"),
    [
        ({"loss": "dpo"}, lambda rows: np.log(2), 0.15),
        ({"loss": "rebel", "rebel_reward": "reward"}, first_rebel("reward"), 0.5),
        ({"loss": "rebel", "rebel_reward": "quantile_reward"}, first_rebel("quantile_reward"), 0.5),
        ({"loss": "simpo", "gamma_beta_ratio": 0.25}, first_simpo, 0.9),  # no reference log-probabilities
        ({"loss": "sft"}, first_sft, 0.5),  # the best completion, token by token
    ],
    ids=["dpo", "rebel", "rebel on quantiles", "simpo", "sft"],
)
def test_each_loss_starts_from_its_definition_and_falls(folder, rows, tmp_path, settings, first, falls_to):
    hidden = "ref_logprob" if settings["loss"] == "simpo" else None
    given = [{name: value for name, value in row.items() if name != hidden} for row in rows]

    losses = losses_of(folder, given, tmp_path, num_train_epochs=20, **settings)

    assert losses[0] == pytest.approx(first(rows), rel=1e-4)
    assert losses[-1] < falls_to * losses[0]


def test_the_dataset_s_own_preference_is_known_by_its_origin(folder, rows, tmp_path):
    """Where the rejected completion is gone, the next one does not take its place."""
    named = [{**row, "origin": ["offline"] * 2 + ["reference"], "sample_index": [0, 1, 0]} for row in rows]
    named[0] |= {"origin": ["offline"] + ["reference"] * 2, "sample_index": [0, 0, 1]}

    losses = losses_of(folder, named, tmp_path / "a", loss="rebel", pairs="dataset")

    differences = np.array([row["reward"][0] - row["reward"][1] for row in rows[1:]], float)
    assert losses[0] == pytest.approx(np.mean((differences / 0.5) ** 2), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "pairs"),
    [
        ("qrpo", "best-worst"),
        ("dpo", "random"),
        ("simpo", "best-worst"),
        ("sft", "random"),
    ],
)
def test_how_a_step_is_cut_changes_nothing(folder, rows, tmp_path, loss, pairs):
    def weights_after(name, **arguments):
        # sharing rounds Llama's norms, which are float32 in any model, in another place
        changed = {"learning_rate": 1e-3, "loss": loss, "pairs": pairs, "packing": False}
        settings = training_arguments(PolicyConfig(**{**SETTINGS, **changed}), tmp_path / name)
        settings = replace(settings, save_strategy="no", **arguments)
        trainer = QRPOTrainer(load_policy(folder).double(), settings, rows[:10])
        trainer.train()
        return trainer.model.state_dict()

    whole = weights_after("whole", per_device_train_batch_size=4, token_budget=10_000)
    variants = [
        weights_after("micro", per_device_train_batch_size=4, token_budget=30),
        # one prompt at a time: prompt-2, without a pair, is a micro-batch without any loss
        weights_after("accumulated", per_device_train_batch_size=1, gradient_accumulation_steps=4),
    ]

    for variant in variants:
        for name, weight in whole.items():
            torch.testing.assert_close(variant[name], weight, rtol=1e-9, atol=1e-11)


def test_a_column_that_the_loss_needs_is_named_when_it_is_missing(folder, rows, tmp_path):
    unrewarded = [{name: value for name, value in row.items() if name != "reward"} for row in rows]

    losses_of(folder, unrewarded, tmp_path / "qrpo")
    losses_of(folder, unrewarded, tmp_path / "dataset", loss="dpo", pairs="dataset")
    with pytest.raises(DataError, match="row has no `reward`, which the loss needs"):
        losses_of(folder, unrewarded, tmp_path / "dpo", loss="dpo")


def text_trainer(folder, output, dataset, **arguments):
    quiet = {"report_to": "none", "disable_tqdm": True, "pairs": "dataset"}
    args = QRPOConfig(output_dir=str(output), **quiet, **arguments)
    return QRPOTrainer(load_policy(folder), args, dataset, AutoTokenizer.from_pretrained(folder))


def test_preference_data_in_trl_s_format_trains_dpo_without_any_reward(folder, tmp_path):
    rows = [{"prompt": f"prompt {i}", "chosen": "some words", "rejected": "more"} for i in range(4)]
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "num_train_epochs": 10}
    trainer = text_trainer(folder, tmp_path, Dataset.from_list(rows), loss="dpo", logging_steps=1, **settings)
    trainer.train()

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert logged[-1]["rewards/accuracies"] == 1.0


def test_completions_in_trl_s_format_train_sft(folder, tmp_path):
    dataset = [{"prompt": "some", "completion": " words"}, {"prompt": "and", "completion": " more"}]

    assert text_trainer(folder, tmp_path, dataset, loss="sft", max_steps=2).train().global_step == 2


@pytest.mark.parametrize(
    ("loss", "idle"),
    [
        ("qrpo", {"pairs", "rebel_reward", "gamma_beta_ratio"}),
        ("dpo", {"transform", "partition", "rebel_reward", "gamma_beta_ratio"}),
        ("rebel", {"transform", "partition", "gamma_beta_ratio"}),
        ("simpo", {"transform", "partition", "rebel_reward"}),
        ("sft", {"beta", "transform", "partition", "rebel_reward", "gamma_beta_ratio"}),
    ],
)
def test_only_settings_that_a_loss_looks_at_enter_its_fingerprint(loss, idle):
    changes = {
        "beta": 0.7,
        "transform": "log",
        "partition": "finite",
        "pairs": "random",
        "rebel_reward": "quantile_reward",
        "gamma_beta_ratio": 0.9,
    }
    plain = keyed(PolicyConfig(loss=loss))

    assert {
        n for n, value in changes.items() if keyed(PolicyConfig(loss=loss, **{n: value})) == plain
    } == idle
