"""One run through all stages with real vLLM; each stage's content is worked out again from its parents, another way."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.support.flows import invoke, run_json

pytestmark = pytest.mark.slow

STAGES = ("prompts", "reference", "completions", "rewards", "quantiles", "shards", "policy", "evaluation")
NUM_REF, NUM_SAMPLES, PROMPTS = 4, 3, 40


@dataclass(frozen=True)
class Finished:
    """A finished run: its configuration, its store, and what `qrpo run --json` and `qrpo show --json` printed."""

    config: Path
    store: Path
    summary: dict[str, Any]
    shown: dict[str, dict[str, Any]]

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """A stage's rows, by plain polars from the URLs that `qrpo show --json` names."""
        return pl.scan_parquet(self.shown[stage]["parts"]).collect().to_dicts()

    def by_prompt(self, stage: str) -> dict[str, dict[str, Any]]:
        return {row["prompt_id"]: row for row in self.rows(stage)}

    def model(self, stage: str) -> Path:
        """The folder of a model stage."""
        (config,) = [Path(url) for url in self.shown[stage]["parts"] if url.endswith("/config.json")]
        return config.parent


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path], prefect_server: str
) -> Finished:
    folder = tmp_path_factory.mktemp("end-to-end")
    config = write_task(
        folder / "task",
        prompts=PROMPTS,
        prompts__eval_fraction=0.3,
        reference__sft={"learning_rate": 5e-3, "num_train_epochs": 2, "prompts_per_step": 8, "processes": 2},
        completions__engine={"kind": "vllm", "max_num_seqs": 32},
        quantiles__num_completions=3,
        evaluation__num_samples=NUM_SAMPLES,
        policy__logging_steps=1,
    )
    store = folder / "store"
    summary = run_json("run", config, "--store", store)
    shown = {stage: run_json("show", "tiny", stage, "--store", store) for stage in STAGES}
    return Finished(config, store, summary, shown)


@pytest.fixture(scope="module")
def reference(finished: Finished) -> Any:
    """The fine-tuned reference and its tokenizer, by plain transformers."""
    return load(finished.model("reference"))


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def templated(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """The tokens of a prompt as the model sees them."""
    return tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]  # type: ignore[no-any-return]


def logprob(model: Any, prompt: list[int], completion: list[int]) -> float:
    """log pi(completion | prompt), from all logits at once."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return float(logprobs.gather(1, torch.tensor(completion)[:, None]).sum())


def call_reward(finished: Finished, rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    """The reward of these texts for the rows' prompts, called as a plain function in a fresh namespace."""
    prompts = finished.by_prompt("prompts")
    answers = [json.loads(prompts[row["prompt_id"]]["metadata"])["answer"] for row in rows]
    folder = finished.config.parent
    names: dict[str, Any] = {}
    exec((folder / "weights.py").read_text(), names)  # noqa: S102
    source = (folder / "reward.py").read_text().replace("from weights import LETTER, WORD", "")
    exec(source, names)  # noqa: S102
    return names["reward"]([""] * len(texts), texts, answers)  # type: ignore[no-any-return]


def test_every_stage_reports_its_work(finished: Finished) -> None:
    stages = finished.summary["stages"]

    assert tuple(stages) == STAGES
    assert all(stage["rejects"] == 0 for stage in stages.values())
    assert all(stage["parts_computed"] > 0 and stage["parts_cached"] == 0 for stage in stages.values())
    for name, stage in stages.items():
        assert stage["fingerprint"] == finished.shown[name]["fingerprint"]


def test_prompts_hold_every_source_row_once_and_both_splits(finished: Finished) -> None:
    source = [
        json.loads(line) for line in (finished.config.parent / "prompts.jsonl").read_text().splitlines()
    ]
    rows = finished.rows("prompts")

    said = {row["messages"][0]["content"]: row for row in rows}
    assert len(rows) == len(said) == len({row["prompt_id"] for row in rows}) == len(source)
    for given in source:
        row = said[given["prompt"]]
        assert row["messages"] == [{"role": "user", "content": given["prompt"]}]
        assert row["offline_completions"] == [given["chosen"], given["rejected"]]
        assert json.loads(row["metadata"]) == {"answer": given["answer"]}
        assert row["source"] == "prompts.jsonl"
    splits = [row["split"] for row in rows]
    assert set(splits) == {"train", "eval"}
    assert 5 <= splits.count("eval") <= 20


def test_reference_has_learnt_the_chosen_completions(
    finished: Finished, reference: Any, base_model: Path
) -> None:
    model, tokenizer = reference
    base, _ = load(base_model)
    gains = []
    for row in finished.rows("prompts"):
        if row["split"] == "train":
            prompt = templated(tokenizer, row)
            chosen = tokenizer.encode(row["offline_completions"][0], add_special_tokens=False)
            gains.append(logprob(model, prompt, chosen) - logprob(base, prompt, chosen))

    assert finished.shown["reference"]["rows"] == len(gains)
    assert np.mean(gains) > 1.0


def test_completions_are_the_decoded_tokens_of_the_samples_that_were_asked_for_and_their_logprobs(
    finished: Finished, reference: Any
) -> None:
    from qrpo.engines.sampling import sample_seed

    model, tokenizer = reference
    rows = finished.rows("completions")
    prompts = finished.by_prompt("prompts")

    keys = {(row["prompt_id"], row["sample_index"]) for row in rows}
    assert keys == {(prompt, index) for prompt in prompts for index in range(NUM_REF)}
    assert len(rows) == len(keys) == len({sample_seed(0, *key) for key in keys})
    for row in rows:
        assert row["origin"] == "reference"
        # vLLM keeps back the bytes of a character that max_tokens cut in two
        decoded = tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["text"].rstrip("\ufffd") == decoded.rstrip("\ufffd")
        assert 1 <= len(row["token_ids"]) <= 12
        assert row["finish_reason"] == (
            "stop" if row["token_ids"][-1] == tokenizer.eos_token_id else "length"
        )
        assert row["finish_reason"] == "stop" or len(row["token_ids"]) == 12
    assert len({(row["prompt_id"], row["text"]) for row in rows}) > 0.8 * len(rows), (
        "samples repeat each other"
    )
    for row in rows[:24]:
        prompt = templated(tokenizer, prompts[row["prompt_id"]])
        assert row["sampled_logprob"] == pytest.approx(logprob(model, prompt, row["token_ids"]), abs=2e-3)


def test_rewards_are_what_the_function_says(finished: Finished) -> None:
    texts = {(row["prompt_id"], row["sample_index"]): row["text"] for row in finished.rows("completions")}
    rows = finished.rows("rewards")

    expected = call_reward(finished, rows, [texts[row["prompt_id"], row["sample_index"]] for row in rows])
    assert len(rows) == len(texts)
    assert [row["reward"] for row in rows] == expected
    assert all(row["components"] == [{"name": "letters", "value": row["reward"]}] for row in rows)
    assert all(row["error"] is None for row in rows)
    assert len(set(expected)) > 4


def test_quantiles_are_shares_of_the_other_reference_rewards(finished: Finished) -> None:
    rewards: dict[str, dict[int, float]] = {}
    for row in finished.rows("rewards"):
        rewards.setdefault(row["prompt_id"], {})[row["sample_index"]] = row["reward"]
    prompts = finished.by_prompt("prompts")
    rows = finished.rows("quantiles")

    assert {row["prompt_id"] for row in rows} == set(rewards)
    for row in rows:
        own = rewards[row["prompt_id"]]
        assert row["ref_rewards"] == sorted(own.values())
        assert row["num_ref"] == NUM_REF
        assert row["ref_mean"] == pytest.approx(np.mean(list(own.values())), rel=1e-6, abs=1e-7)
        assert row["ref_std"] == pytest.approx(np.std(list(own.values()), ddof=1), rel=1e-6, abs=1e-7)
        assert row["sample_index"] == ([0, 1, 2] if prompts[row["prompt_id"]]["split"] == "train" else [])
        columns = ("sample_index", "reward", "quantile_reward", "quantile_low", "quantile_high")
        for index, reward, quantile, low, high in zip(*(row[name] for name in columns), strict=True):
            others = [own[other] for other in own if other != index]
            assert reward == own[index]
            assert quantile == pytest.approx(sum(other <= reward for other in others) / len(others))
            assert 0 <= low <= quantile <= high <= 1


def test_shards_hold_the_templated_prompt_the_sampled_tokens_and_the_plain_reference_logprob(
    finished: Finished, reference: Any
) -> None:
    model, tokenizer = reference
    prompts, quantiles = finished.by_prompt("prompts"), finished.by_prompt("quantiles")
    sampled = finished.rows("completions")
    tokens = {(row["prompt_id"], row["sample_index"]): row["token_ids"] for row in sampled}
    rows = finished.rows("shards")

    train = [prompt_id for prompt_id, row in prompts.items() if row["split"] == "train"]
    shuffled = [row["prompt_id"] for row in rows]
    assert sorted(shuffled) == sorted(train)
    assert shuffled != train
    for row in rows:
        own = quantiles[row["prompt_id"]]
        template = templated(tokenizer, prompts[row["prompt_id"]])
        assert row["prompt_token_ids"] == template
        assert row["completion_token_ids"] == [tokens[row["prompt_id"], k] for k in row["sample_index"]]
        for name in ("sample_index", "origin", "reward", "quantile_reward"):
            assert row[name] == own[name]
        assert row["num_ref"] == NUM_REF - 1, "each quantile was taken among the others"
        expected = [logprob(model, template, completion) for completion in row["completion_token_ids"]]
        assert row["ref_logprob"] == pytest.approx(expected, abs=1e-4)


def test_policy_starts_at_the_reference_and_ends_elsewhere(finished: Finished, reference: Any) -> None:
    import torch

    policy, tokenizer = load(finished.model("policy"))
    metrics = pl.read_parquet(finished.model("policy") / "metrics.parquet")
    steps = metrics.filter(pl.col("loss").is_not_null())

    assert tokenizer.chat_template == reference[1].chat_template
    assert metrics["initial_log_ratio/max_abs"].drop_nulls().to_list() == pytest.approx([0.0], abs=1e-4)
    assert steps["step"].to_list() == list(range(1, len(steps) + 1))
    assert steps["loss"].is_finite().all()
    weights = policy.state_dict()
    assert any(not torch.equal(value, weights[name]) for name, value in reference[0].state_dict().items())


def test_first_loss_is_that_of_a_zero_log_ratio(finished: Finished, tmp_path: Path) -> None:
    """At step 0 policy and reference agree, so the loss is (q - beta log Z)^2; the learning rate warms up from 0."""
    from storage import ShardReader, Store
    from tasks.stages import TABLES
    from tasks.training_files import training_files

    store = Store(finished.store)
    manifest = store.manifest("shards", finished.shown["shards"]["fingerprint"])
    assert manifest is not None
    files, training, _ = training_files(
        store, manifest.parts, TABLES["shards"], tmp_path, 0, lambda name: False
    )
    reader = ShardReader(files, training, seed=0)
    first = [row["quantile_reward"] for row, _ in zip(reader.iterate(0), range(8), strict=False)]
    beta = 0.1
    beta_log_z = beta * np.log(beta * (np.exp(1 / beta) - 1))
    expected = np.mean((np.concatenate(first) - beta_log_z) ** 2)

    metrics = pl.read_parquet(finished.model("policy") / "metrics.parquet")
    assert metrics.filter(pl.col("step") == 1)["loss"][0] == pytest.approx(expected, rel=1e-3)


def test_evaluation_rows_are_fresh_held_out_samples_with_recomputed_rewards_and_quantiles(
    finished: Finished,
) -> None:
    prompts, quantiles = finished.by_prompt("prompts"), finished.by_prompt("quantiles")
    rows = finished.rows("evaluation")

    held_out = {prompt_id for prompt_id, row in prompts.items() if row["split"] == "eval"}
    keys = {(row["prompt_id"], row["model"], row["sample_index"]) for row in rows}
    assert len(rows) == len(keys)
    assert keys == {
        (prompt_id, model, index)
        for prompt_id in held_out
        for model in ("policy", "reference")
        for index in range(NUM_SAMPLES)
    }
    assert [row["reward"] for row in rows] == call_reward(finished, rows, [row["text"] for row in rows])
    for row in rows:
        others = quantiles[row["prompt_id"]]["ref_rewards"]
        below, equal = sum(r < row["reward"] for r in others), sum(r == row["reward"] for r in others)
        assert row["quantile_reward"] == pytest.approx((below + equal / 2) / len(others))


def test_evaluation_logprobs_are_plain_forwards_of_the_model_that_drew_and_of_the_reference(
    finished: Finished, reference: Any
) -> None:
    policy, tokenizer = load(finished.model("policy"))
    prompts = finished.by_prompt("prompts")

    rows = finished.rows("evaluation")
    for row in rows[:12] + rows[-12:]:
        prompt = templated(tokenizer, prompts[row["prompt_id"]])
        drawn_by = {"policy": policy, "reference": reference[0]}[row["model"]]
        assert row["model_logprob"] == pytest.approx(logprob(drawn_by, prompt, row["token_ids"]), abs=1e-4)
        assert row["ref_logprob"] == pytest.approx(logprob(reference[0], prompt, row["token_ids"]), abs=1e-4)


def test_summary_is_what_a_person_would_count(finished: Finished) -> None:
    rows = finished.rows("evaluation")
    summary = finished.summary["evaluation"]
    prompts = sorted({row["prompt_id"] for row in rows})
    values: dict[str, Callable[[dict[str, Any]], float]] = {
        "reward": lambda row: row["reward"],
        "quantile_reward": lambda row: row["quantile_reward"],
        "length": lambda row: len(row["token_ids"]),
    }

    def by_prompt(model: str, value: Callable[[dict[str, Any]], float]) -> list[list[float]]:
        return [[value(r) for r in rows if r["prompt_id"] == p and r["model"] == model] for p in prompts]

    assert summary["prompts"] == len(prompts)
    for model in ("policy", "reference"):
        for name, value in values.items():
            means = [np.mean(group) for group in by_prompt(model, value)]
            assert summary[model][name]["mean"] == pytest.approx(np.mean(means))
            error = np.std(means, ddof=1) / np.sqrt(len(means))
            assert summary[model][name]["standard_error"] == pytest.approx(error)
        reasons = [row["finish_reason"] for row in rows if row["model"] == model]
        assert summary[model]["finish_reasons"] == {reason: reasons.count(reason) for reason in set(reasons)}
    ours, theirs = (by_prompt(model, lambda row: row["reward"]) for model in ("policy", "reference"))
    wins = [
        np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in mine for b in other])
        for mine, other in zip(ours, theirs, strict=True)
    ]
    assert summary["win_rate"]["mean"] == pytest.approx(np.mean(wins))
    assert summary["win_rate"]["low"] <= np.mean(wins) <= summary["win_rate"]["high"]
    log_ratios = by_prompt("policy", lambda row: row["model_logprob"] - row["ref_logprob"])
    assert summary["kl"]["mean"] == pytest.approx(np.mean(log_ratios))
    assert summary["kl"]["k3"] == pytest.approx(
        np.mean(np.exp(-np.array(log_ratios)) - 1 + np.array(log_ratios))
    )


def test_evaluation_samples_are_none_of_the_reference_samples_seeds(finished: Finished) -> None:
    from qrpo.engines.sampling import sample_seed

    prompts = [row["prompt_id"] for row in finished.rows("prompts")]
    namespaces = ("reference", "evaluation/policy", "evaluation/reference")
    seeds = [sample_seed(0, p, index, name) for p in prompts for index in range(8) for name in namespaces]

    assert len(set(seeds)) == len(seeds)


def test_second_run_is_cached_and_starts_no_server(
    finished: Finished, qrpo_process: Callable[..., Any], snapshot: Callable[[Path], Any]
) -> None:
    before = snapshot(finished.store)

    # nobody listens there: a run that asked Prefect for anything would fail
    done = qrpo_process(
        "run", finished.config, "--store", finished.store, "--json", PREFECT_API_URL="http://127.0.0.1:9/api"
    )

    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert all(stage["parts_computed"] == 0 and stage["parts_cached"] > 0 for stage in stages.values())
    assert {name: stage["fingerprint"] for name, stage in stages.items()} == {
        name: stage["fingerprint"] for name, stage in finished.summary["stages"].items()
    }
    assert json.loads(done.stdout)["evaluation"] == finished.summary["evaluation"]
    after = snapshot(finished.store)
    assert {name for name in after if after[name] != before.get(name)} - {"runs/tiny.json"} == set()
    assert set(after) == set(before)


def test_second_run_says_so_to_a_person(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL")  # it would start a server, and say so

    done = invoke("run", finished.config, "--store", finished.store)

    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("cached") == len(STAGES)
    assert "Prefect server" not in done.stderr


@pytest.mark.parametrize("stage", ["prompts", "completions", "rewards", "quantiles", "shards", "evaluation"])
def test_duckdb_reads_every_artifact(finished: Finished, stage: str) -> None:
    import duckdb

    shown = finished.shown[stage]

    count = duckdb.execute(
        "select count(*), count(distinct prompt_id) from read_parquet($1)", [shown["parts"]]
    )
    rows, prompts = count.fetchall()[0]
    assert rows == shown["rows"]
    held_out = len({row["prompt_id"] for row in finished.rows("prompts") if row["split"] == "eval"})
    expected = {"shards": PROMPTS - held_out, "evaluation": held_out}
    assert prompts == expected.get(stage, PROMPTS)


def test_lineage_leads_down_to_the_source_and_the_model(finished: Finished) -> None:
    import hashlib

    source = hashlib.sha256((finished.config.parent / "prompts.jsonl").read_bytes()).hexdigest()
    lineage = finished.shown["evaluation"]["lineage"]

    by_stage = {step["stage"]: step for step in lineage}
    assert set(by_stage) == set(STAGES) - {"evaluation"}
    assert source in json.dumps(by_stage["prompts"]["inputs"])
    assert "digest" in json.dumps(by_stage["reference"]["inputs"])
