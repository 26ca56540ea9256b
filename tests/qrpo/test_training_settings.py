"""Training settings: declared once, passed through by name, and in fingerprints only if they change results."""

import contextlib
import os
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from pydantic import ValidationError
from transformers import HfArgumentParser, TrainingArguments

from qrpo import QRPOConfig
from qrpo.config import is_execution_option, keyed
from qrpo.errors import ConfigError, TrainingError
from qrpo.training.arguments import QRPOSettings
from qrpo.training.settings import REFUSED, RENAMED, LoraConfig, PolicyConfig, SftConfig
from qrpo.training.trainer_arguments import check_arguments, training_arguments
from tests.support.refusals import refuses
from tests.support.training import metrics, same_weights, train


def test_a_default_section_keeps_the_fingerprint_of_earlier_versions():
    common = {
        "lr_scheduler": "linear",
        "warmup": 0.1,
        "epochs": 1.0,
        "max_steps": None,
        "prompts_per_step": 128,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bad_step": "stop",
        "max_loss_growth": 1000.0,
        "dtype": "float32",
    }
    qrpo = {"loss": "qrpo", "beta": 0.1, "transform": "identity", "partition": "continuous", "seed": None}
    assert keyed(SftConfig()) == {**common, "learning_rate": 2e-5}
    assert keyed(PolicyConfig()) == {**common, **qrpo, "learning_rate": 1e-6}
    assert keyed(PolicyConfig(bf16=True))["dtype"] == "bfloat16"


def test_every_declared_setting_reaches_the_trainer_by_its_name(tmp_path):
    values = {
        "beta": 0.3,
        "loss": "dpo",
        "pairs": "random",
        "max_loss_growth": None,
        "lr_scheduler_type": "cosine",
    }
    further = {
        "optim": "adamw_torch",
        "adam_beta2": 0.98,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }

    arguments = training_arguments(PolicyConfig(**values, **further), tmp_path, seed=3)

    assert isinstance(arguments, QRPOConfig)
    for name, value in {**values, **further, "seed": 3, "per_device_train_batch_size": 128}.items():
        assert getattr(arguments, name) == value, name
    assert training_arguments(PolicyConfig(seed=4), tmp_path, seed=3).seed == 4
    assert set(QRPOSettings.__dataclass_fields__) <= set(PolicyConfig.model_fields) & set(
        QRPOConfig.__dataclass_fields__
    )


def test_the_section_and_the_arguments_say_the_same_about_a_setting():
    parser = HfArgumentParser(QRPOConfig)
    helps = {action.dest: action.help for action in parser._actions}
    for name in QRPOSettings.__dataclass_fields__:
        assert helps[name] == PolicyConfig.model_fields[name].description
        assert QRPOConfig.__dataclass_fields__[name].default == PolicyConfig.model_fields[name].default
    assert is_execution_option(PolicyConfig, "token_budget")
    assert not is_execution_option(PolicyConfig, "beta")


@pytest.mark.parametrize(
    ("further", "added"),
    [
        ({"adam_beta2": 0.95}, {"adam_beta2": 0.95}),
        ({"optim": "sgd"}, {"optim": "sgd"}),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
            {"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        ),
        ({"loss_type": "mae"}, {"loss_type": "mae"}),
        ({"run_name": "mine", "logging_first_step": True, "dataloader_num_workers": 2}, {}),
        ({"torch_compile": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, {}),
    ],
)
def test_only_further_settings_that_change_results_enter_the_fingerprint(further, added):
    section = PolicyConfig(**further)

    assert keyed(section) == {**keyed(PolicyConfig()), **added}
    assert PolicyConfig.model_validate(section.model_dump(mode="json")) == section


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        (SftConfig, {"epochs": 3}, "replaced by `num_train_epochs`"),
        (SftConfig, {"warmup": 3}, "replaced by `warmup_steps`"),
        (SftConfig, {"lr_scheduler": "cosine"}, "replaced by `lr_scheduler_type`"),
        (SftConfig, {"keep_checkpoints": 3}, "replaced by `save_total_limit`"),
        (PolicyConfig, {"dtype": "bfloat16"}, "replaced by `bf16: true`"),
        (PolicyConfig, {"eval_shards": 2}, "replaced by `eval_fraction`"),
        (PolicyConfig, {"output_dir": "out"}, "not available here; the store holds"),
        (PolicyConfig, {"deepspeed": "config.json"}, "not available here; set `processes` and `fsdp`"),
        (PolicyConfig, {"gradient_accumulation_steps": 2}, "not available here; set `prompts_per_step`"),
        (SftConfig, {"seed": 2}, "not available here; set the `seed`"),
        (PolicyConfig, {"adam_beta3": 0.9}, "Extra inputs are not permitted"),
        (PolicyConfig, {"adam_beta2": "much"}, "valid number"),
        (PolicyConfig, {"neftune_noise_alpha": -1.0}, "must not be negative"),
        (PolicyConfig, {"adam_beta2": "0.95"}, "valid number"),
        (PolicyConfig, {"optim": "adamw"}, "should be 'adamw_torch'"),
        (PolicyConfig, {"patience": 2}, "eval_fraction is 0"),
    ],
)
def test_keys_that_do_not_apply_are_refused_with_what_to_do(section, given, message):
    with pytest.raises(ValidationError, match=message) as caught:
        section(**given)
    if given.keys() != {"patience"}:
        assert caught.value.errors()[0]["loc"] == tuple(given)


def test_further_settings_change_the_training_and_execution_options_do_not(folder, make_rows, tmp_path):
    rows = make_rows(8, 2)
    plain, _ = train(folder, rows, tmp_path / "plain")
    options, _ = train(folder, rows, tmp_path / "options", logging_first_step=True, dataloader_num_workers=2)
    floor = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-3}}
    changed, _ = train(folder, rows, tmp_path / "changed", optim="sgd", **floor)

    assert same_weights(options, plain)
    assert not same_weights(changed, plain)
    assert metrics(tmp_path / "changed")["learning_rate"] == pytest.approx([1e-2, 7.5e-3])


def test_reading_a_section_loads_no_torch():
    code = "import sys, qrpo.training.settings as s; s.PolicyConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adam_beta1": 2.0}, "Invalid beta parameter"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-7}}, "unexpected keyword argument 'min_lr'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate"),
    ],
)
def test_what_the_optimizer_or_the_schedule_refuses_is_refused_before_a_run(given, message):
    for section in (SftConfig(**given), PolicyConfig(**given)):
        assert section.needs_check
        refuses(ConfigError, message, check_arguments, section)


def test_trying_settings_out_leaves_the_environment_as_it_was():
    before = dict(os.environ)
    check_arguments(PolicyConfig(fp16=True, torch_compile=True, fsdp=True, processes=2))
    assert dict(os.environ) == before


# ------------------------------------------------------------------------------------------- the ends of settings

ENDS = (-1, 0, 20261127133800, 2**64, float("inf"), float("nan"), -0.5)


def numbers_of(section):
    """The names of a section's numeric settings, those of LoRA as `lora.name`."""
    for name, field in section.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        if LoraConfig in kinds:
            yield from (f"{name}.{inner}" for inner in numbers_of(LoraConfig))
        elif {int, float} & {*kinds, *(kind for one in kinds for kind in get_args(one))}:
            yield name


def at(name, value):
    outer, _, inner = name.partition(".")
    return {
        outer: {inner: value} if inner else value,
        **({"eval_fraction": 0.5} if name == "patience" else {}),
    }


def further_numbers():
    """The numeric fields of `TrainingArguments` that a section passes on."""
    refused = {name for names in REFUSED.values() for name in names.split()}
    hints = get_type_hints(TrainingArguments)
    names = hints.keys() - refused - RENAMED.keys() - PolicyConfig.model_fields.keys()
    return sorted(name for name in names if {int, float} & {hints[name], *get_args(hints[name])})


@pytest.mark.parametrize("value", ENDS)
def test_every_number_at_its_ends_is_refused_when_it_is_read_or_works(folder, make_rows, tmp_path, value):
    names = [*numbers_of(PolicyConfig), *further_numbers()]
    assert len(names) > 30
    accepted = {}
    for name in names:
        try:
            config = PolicyConfig(**at(name, value))
            if config.needs_check:
                check_arguments(config)
        except (ValidationError, ConfigError):
            continue
        accepted.setdefault(f"{name}" if "." in name else type(getattr(config, name, 0)).__name__, []).append(
            name
        )
    rows = [{**row, "ref_std": 1.0} for row in make_rows(4, 2)]
    for number, group in enumerate(accepted.values()):
        settings = {"max_steps": 2, "max_initial_log_ratio": float("inf")}
        for name in set(group) - {"patience", "max_steps"}:
            settings |= at(name, value)
        with contextlib.suppress(TrainingError):  # one line: an absurd rate has made the loss infinite
            train(folder, rows, tmp_path / str(number), **settings)
