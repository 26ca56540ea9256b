"""Training on two processes (gloo, CPU): the losses and weights of one process on the same global batches."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import polars
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from qrpo.errors import EngineError, TrainingError
from qrpo.processes.child import Child
from qrpo.training.logprobs import score_logprobs
from qrpo.training.ranks import stream_ranks
from qrpo.training.rows import PER_COMPLETION
from qrpo.training.runs import load_policy
from tests.support import training
from tests.support.processes import are_gone, is_gone
from tests.support.rewards import wait_until

pytestmark = pytest.mark.slow

TARGETS = training.__file__
SETTINGS = {
    **training.SETTINGS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 2,
    "warmup_steps": 0.2,
    "token_budget": 64,
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def rows(make_rows):
    """13 prompts: the last step of an epoch has one, so one of two processes has none."""
    return make_rows(13, 3)


@pytest.fixture(scope="module")
def alone(folder, rows, tmp_path_factory):
    """The output of one process."""
    output = tmp_path_factory.mktemp("alone")
    training.train(folder, rows, output, **SETTINGS, save_total_limit=9)
    return output


def assert_same(output, alone):
    """Up to the rounding of sums in another order."""
    ours, theirs = (
        polars.read_parquet(path / "metrics.parquet").drop_nulls("loss") for path in (output, alone)
    )
    assert ours["step"].to_list() == theirs["step"].to_list() == list(range(1, 9))
    for name in ("loss", "learning_rate", "grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
    weights = load_file(output / "final" / "model.safetensors")
    for name, weight in load_file(alone / "final" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)


def test_torchrun_with_two_processes_is_one_process_on_the_same_batches(folder, rows, alone, tmp_path):
    script, rows_file = tmp_path / "train.py", tmp_path / "rows"
    rows_file.write_bytes(pickle.dumps(rows))
    script.write_text(
        textwrap.dedent("""
        import json, pickle, sys
        from pathlib import Path
        from qrpo.training.settings import PolicyConfig
        from qrpo.training.runs import train_policy
        folder, rows, settings, output = sys.argv[1:]
        config = PolicyConfig(**json.loads(settings))
        train_policy(folder, pickle.loads(Path(rows).read_bytes()), config, output)
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(folder), str(rows_file), json.dumps(SETTINGS), str(tmp_path / "run")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "run", alone)


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """The reference in bfloat16, with one weight as embedding and head, and one that also sees images."""
    found = {}

    def save(name, model):
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(folder / file, found[name])

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    save("half", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    config.tie_word_embeddings = True
    save("tied", AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"image_size": 28, "patch_size": 14, "mm_tokens_per_image": 4}
    save(
        "images",
        Gemma3ForConditionalGeneration(Gemma3Config(text_config=text | heads, vision_config=vision | images)),
    )
    return found


def scored(folder, rows, dtype=None):
    scores = score_logprobs(load_policy(folder), rows, 1000, dtype=dtype)
    return [{**row, "ref_logprob": score} for row, score in zip(rows, scores, strict=True)]


@pytest.fixture(scope="module")
def on_two(folder, folders, rows, make_rows, alone, tmp_path_factory):
    """Runs on two processes, one after the other, since starting processes takes most of the time; those in bfloat16 also on one."""
    output = tmp_path_factory.mktemp("on-two")
    mixed = {
        "bf16": True,
        "learning_rate": 2e-4,
        "max_steps": 12,
        "num_train_epochs": 4,
        "token_budget": 400,
        "prompts_per_step": 4,
        "save_dtype": "bfloat16",
    }
    long = [{**row, "completion_token_ids": [ids * 8 for ids in row["completion_token_ids"]]} for row in rows]
    bad = [dict(row) for row in rows]
    bad[7]["quantile_reward"] = np.array([0.1, np.nan, 0.3], dtype=np.float32)
    empty = [{**row, **{name: row[name][:0] for name in PER_COMPLETION}} for row in rows[:3]]
    stopping = {"eval_fraction": 0.5, "eval_steps": 1, "patience": 2, "num_train_epochs": 30}
    plan = {
        "fsdp": {"settings": {**SETTINGS, "fsdp": True, "save_total_limit": 9}},
        "ddp from fsdp": {"settings": SETTINGS, "checkpoint": output / "fsdp" / "checkpoint-4"},
        "fsdp from one": {"settings": {**SETTINGS, "fsdp": True}, "checkpoint": alone / "checkpoint-4"},
        "patience": {
            "settings": {**SETTINGS, **stopping, "learning_rate": 0.05, "fsdp": True},
            "eval_rows": rows[:3],
        },
        "nan": {"settings": SETTINGS, "rows": bad},
        "sigterm": {"settings": SETTINGS, "sigterm_after": 5},
        "stream": {"settings": {**SETTINGS, "max_steps": 4}, "iterable": True},
        "empty rows": {"settings": {**SETTINGS, "max_steps": 4}, "rows": empty + rows[3:], "iterable": True},
    }
    sft = {"learning_rate": 1e-3, "prompts_per_step": 4, "num_train_epochs": 2}
    plan |= {f"sft {fsdp}": {"settings": {**sft, "fsdp": fsdp}, "sft": True} for fsdp in (False, True)}
    for name in ("half", "tied"):
        on_rows = {"folder": folders[name], "rows": scored(folders[name], long, torch.bfloat16)}
        plan |= {f"{name} fsdp": {"settings": {**mixed, "fsdp": True}, **on_rows}}
        plan |= {f"{name} ddp": {"settings": mixed, **on_rows}}
    on_rows = {"folder": folders["images"], "rows": scored(folders["images"], rows)}
    plan |= {f"images {fsdp}": {"settings": {**SETTINGS, "fsdp": fsdp}, **on_rows} for fsdp in (False, True)}
    runs = [{"folder": folder, "rows": rows, "output": output / name, **run} for name, run in plan.items()]
    found = list(stream_ranks(f"{TARGETS}:train_runs", runs, processes=2, log=output / "log"))
    on_one = [
        {**run, "output": output / f"{run['output'].name} on one"}
        for run in runs
        if run["output"].name in ("half ddp", "tied ddp", "stream", "empty rows", "sft False")
    ]
    names = [run["output"].name for run in (*runs, *on_one)]
    found += training.train_runs(on_one)
    return output, dict(zip(names, found, strict=True))


def test_checkpoints_of_one_process_of_ddp_and_of_fsdp_fit_each_other(on_two, alone, folder, rows):
    output, runs = on_two
    assert runs["fsdp"]["sharded"]
    assert not runs["ddp from fsdp"]["sharded"]
    for name in ("fsdp", "ddp from fsdp", "fsdp from one"):
        assert "error" not in runs[name]
        assert_same(output / name, alone)
    assert [report["step"] for report in runs["fsdp from one"]["reports"]] == [5, 6, 7, 8]
    shutil.copytree(output / "fsdp" / "checkpoint-4", output / "one from fsdp" / "checkpoint-4")
    _, progress = training.train(folder, rows, output / "one from fsdp", **SETTINGS)
    assert [report["step"] for report in progress] == [5, 6, 7, 8]
    assert_same(output / "one from fsdp", alone)


@pytest.mark.parametrize("model", ["half", "tied"])
def test_fsdp_and_ddp_learn_in_bfloat16_what_one_process_learns(on_two, model):
    output, runs = on_two
    losses = {}
    for way in ("fsdp", "ddp", "ddp on one"):
        run = runs[f"{model} {way}"]
        assert run["dtypes"] == {torch.float32}, "log-probabilities of whole completions, up to 1,000 nats"
        losses[way] = np.array([report["loss"] for report in run["reports"]])
    np.testing.assert_allclose(losses["fsdp"], losses["ddp on one"], rtol=0.05, atol=2e-3)
    np.testing.assert_allclose(losses["ddp"], losses["ddp on one"], rtol=0.05, atol=2e-3)
    saved = {way: output / f"{model} {way}" / "final" for way in losses}
    names = [set(load_file(folder / "model.safetensors")) for folder in saved.values()]
    assert names[0] == names[1] == names[2]
    configs = {(folder / "config.json").read_text() for folder in saved.values()}
    assert len(configs) == 1
    lost = [training.metrics(folder.parent)["saved_log_ratio/mean_abs"] for folder in saved.values()]
    np.testing.assert_allclose(lost[:2], lost[2:] * 2, rtol=0.5)
    config = json.loads(configs.pop())
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"]


def test_metrics_are_those_of_all_processes(on_two, alone):
    output, _ = on_two
    ours = polars.read_parquet(output / "fsdp" / "metrics.parquet").drop_nulls("loss")
    theirs = polars.read_parquet(alone / "metrics.parquet").drop_nulls("loss")
    # Speeds, and what is measured on each process's first rows.
    other = ("tokens_per_second", "eta_seconds", "train_", "initial_log_ratio", "total_flos")
    names = [name for name in theirs.columns if not name.startswith(other)]
    assert len(names) > 25
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_sharded_training_stops_early_with_the_best_weights(on_two):
    output, runs = on_two
    losses = polars.read_parquet(output / "patience" / "metrics.parquet")["eval_loss"].drop_nulls().to_list()
    assert "error" not in runs["patience"]
    assert losses.index(min(losses)) == len(losses) - 3


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("stream", "stream"),
        ("empty rows", "empty rows"),
        ("sft False", "sft False"),
        ("sft True", "sft False"),
    ],
)
def test_two_processes_end_with_the_weights_of_one(on_two, name, other):
    """The last step of a stream has one row, so a process has none."""
    output, runs = on_two
    assert "error" not in runs[name]
    ours, theirs = (
        load_file(output / run / "final" / "model.safetensors") for run in (name, f"{other} on one")
    )
    for weight in theirs:
        torch.testing.assert_close(ours[weight], theirs[weight], rtol=0, atol=2e-5)


def test_a_multimodal_model_learns_from_text(on_two):
    _, runs = on_two
    for name in ("images False", "images True"):
        assert "error" not in runs[name]
        losses = [report["loss"] for report in runs[name]["reports"]]
        assert len(losses) == 8
        assert np.isfinite(losses).all()


def test_a_step_that_is_not_finite_stops_all_and_names_the_prompt_of_any_process(on_two):
    _, runs = on_two
    assert "not finite for these prompts: prompt-7." in runs["nan"]["error"]


def test_two_processes_told_to_end_go_on_as_one(on_two, folder, rows, alone):
    """A SIGTERM to one process stops both after the same step; another number of processes goes on with the same rows."""
    output, runs = on_two
    assert "stopped by SIGTERM after step 6 of 8" in runs["sigterm"]["error"]
    training.train(folder, rows, output / "sigterm", **SETTINGS)
    assert_same(output / "sigterm", alone)


def test_a_rank_s_failure_is_raised_as_what_it_is(tmp_path):
    with pytest.raises(TrainingError, match="rank 1 cannot"):
        list(stream_ranks(f"{TARGETS}:fail_on_the_second", processes=2, log=tmp_path / "log"))


def pids_in(folder):
    """The ids of the two ranks, once both have left theirs."""
    files = [folder / rank for rank in "01"]
    assert wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def test_a_killed_rank_ends_all(tmp_path):
    ranks = stream_ranks(f"{TARGETS}:leave_pid_and_wait", tmp_path, processes=2)
    next(ranks)
    pids = pids_in(tmp_path)
    os.kill(pids[1], 9)

    with pytest.raises(EngineError, match="rank 1 of 2, was killed by SIGKILL"):
        list(ranks)
    assert are_gone(pids)


def test_kill_9_of_the_parent_leaves_no_rank(tmp_path):
    """As in the pipeline: a process that has a child for the stage, which has one for each rank."""
    script = (
        "import time\nfrom pathlib import Path\nfrom qrpo.processes.child import Child\n"
        f"child = Child('qrpo.processes.serving:GeneratorFunction', {f'{TARGETS}:start_ranks'!r})\n"
        f"items = child.stream('run', 2, Path({str(tmp_path)!r}))\n"
        "print(next(items), flush=True)\ntime.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        stage = int(parent.stdout.readline())
        pids = [stage, *pids_in(tmp_path)]
        assert not any(map(is_gone, pids))
        parent.kill()
        parent.wait()
        assert are_gone(pids)


def test_closing_early_leaves_no_rank(tmp_path):
    items = Child("qrpo.processes.serving:GeneratorFunction", f"{TARGETS}:start_ranks").stream(
        "run", 2, tmp_path
    )
    next(items)
    items.close()
    assert are_gone([int(path.read_text()) for path in tmp_path.iterdir() if path.read_text()])
