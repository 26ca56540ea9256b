"""A tiny task to run the whole pipeline on, and the `qrpo` command."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from tests.support.flows import QRPO, clean_environment, invoke, run_json

REWARD = '''\
"""How many of the letters asked for were said, and a little less for every word."""

from weights import LETTER, WORD


def reward(prompts, completions, answer, **columns):
    return [
        LETTER * sum(letter in right for letter in said) - WORD * len(said.split())
        for said, right in zip(completions, answer, strict=True)
    ]
'''


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that knows the task's words, float32, 64 tokens of context."""
    from qrpo.tiny import build_tiny_model

    texts = [f"{row['prompt']} {row['chosen']}" for row in make_rows(60)]
    # two heads of 32: vLLM's CPU attention refuses smaller heads
    folder = tmp_path_factory.mktemp("base") / "model"
    return build_tiny_model(folder, texts, hidden_size=64, heads=2, layers=1, vocab_size=300, max_length=64)


@pytest.fixture(scope="session")
def write_task(base_model: Path) -> Callable[..., Path]:
    """Write prompts, reward and configuration into a folder; `changes` go into the configuration by dotted key."""

    def write(folder: Path, *, prompts: int = 24, rows: list[Any] | None = None, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / "prompts.jsonl", make_rows(prompts) if rows is None else rows)
        (folder / "reward.py").write_text(REWARD)
        (folder / "weights.py").write_text("LETTER = 0.25\nWORD = 0.125\n")
        config: dict[str, Any] = {
            "name": "tiny",
            "prompts": {"source": str(folder / "prompts.jsonl")},
            "reference": {"model": {"path": str(base_model)}},
            "completions": {
                "num_ref": 4,
                "samples_per_part": 2,
                "engine": {"kind": "transformers", "max_num_seqs": 64},
                "sampling": {"max_tokens": 12},
            },
            "rewards": [
                {"kind": "function", "name": "letters", "function": f"{folder / 'reward.py'}:reward"}
            ],
            "policy": {"learning_rate": 1e-3, "epochs": 2, "prompts_per_step": 8, "save_steps": 2},
            "run": {"part_size": 8},
        }
        for path, value in changes.items():
            *sections, key = path.split("__")
            target = config
            for section in sections:
                target = target[int(section)] if isinstance(target, list) else target.setdefault(section, {})
            target[key] = value
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture(scope="session")
def trained(
    write_task: Callable[..., Path], prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with `config.yaml` and a `store` that holds its run `tiny`, evaluated. To be copied, not changed: `copy_of`.

    Made once for all workers of pytest-xdist: the first one that needs it makes it, another one waits.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.yaml").exists():
            shutil.rmtree(folder, ignore_errors=True)
            config = write_task(
                folder,
                prompts__eval_fraction=0.4,
                policy__epochs=1,
                policy__checkpoint_steps=1,
                evaluation__num_samples=2,
                run__cpu_threads=1,
            )
            unfinished = config.rename(folder / "unfinished.yaml")
            run_json("run", unfinished, "--store", folder / "store")
            unfinished.rename(config)
    return folder


@pytest.fixture(scope="session")
def copy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A copy of the store in a folder, to go on from."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder / "store", tmp_path_factory.mktemp("copy") / "store"))

    return copy


@pytest.fixture
def qrpo(prefect_server: str) -> Callable[..., Any]:
    """The `qrpo` command in this process, with the session's Prefect server: `.exit_code`, `.stdout`, `.stderr`."""
    return invoke


@pytest.fixture(scope="session")
def qrpo_process() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The `qrpo` command as another process. It starts a Prefect server unless `environment` names one."""

    def run(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [QRPO, *map(str, arguments)],
            env=clean_environment(**environment),
            capture_output=True,
            text=True,
            timeout=400,
        )

    return run


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, tuple[int, str]]]:
    """Every file under a folder with the time of its last change in nanoseconds and its sha256."""

    def take(folder: Path) -> dict[str, tuple[int, str]]:
        return {
            path.relative_to(folder).as_posix(): (
                path.stat().st_mtime_ns,
                hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return take


HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></td></table></pre>"
    "[bold]b[/bold] {{ 7*7 }} \x1b[31mred\x1b]0;owned\x07 \u202edesrever\u202c \x00"
)
"""Markup, scripts, templates, terminal commands and direction marks, as a model could write them."""


@pytest.fixture(scope="session")
def write_artifacts() -> Callable[..., Any]:
    """Write every stage of a run into a store, a few prompts a part, without computing anything; the first completion is hostile.

    `reward_shift` is added to the rewards of the parts in the second half: those differ between two runs.
    """

    def write(
        store: Any,
        run: str,
        *,
        prompts: int = 12,
        part_size: int = 4,
        num_ref: int = 6,
        reward_shift: float = 0.0,
    ) -> None:
        from storage import manifest_of

        made: dict[str, list[Any]] = {}
        for first in range(0, prompts, part_size):
            numbers = range(first, min(first + part_size, prompts))
            shift = reward_shift if 2 * first >= prompts else 0.0
            above: dict[str, str] = {}
            for stage, rows in artifact_rows(numbers, num_ref, shift).items():
                record = commit_rows(
                    store, stage, f"{numbers.start}-{numbers.stop}-{num_ref}-{shift}", rows, above
                )
                made.setdefault(stage, []).append(record)
                above = above | {record.fingerprint: record.digest}
        stages, parents = {}, {}
        for stage, records in made.items():
            inputs = {"source": ["digest-of-the-source"]} if stage == "prompts" else {}
            manifest = store.commit_manifest(
                manifest_of(stage, "tests", records, parents=parents, inputs=inputs)
            )
            parents = {stage: manifest.fingerprint}
            stages[stage] = {"fingerprint": manifest.fingerprint}
        policy = store.commit_manifest(
            manifest_of("policy", "tests", [commit_policy(store)], parents=parents)
        )
        stages["policy"] = {"fingerprint": policy.fingerprint}
        store.write_run(run, {"stages": stages, "updated": "2026-11-24T12:00:00Z"})

    return write


def artifact_rows(numbers: range, num_ref: int, shift: float) -> dict[str, list[dict[str, Any]]]:
    """Rows of the stages for these prompts; the reward of sample k of prompt p is p + k / 10."""
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("prompts", "completions", "rewards", "quantiles", "shards", "evaluation")
    }
    for p in numbers:
        prompt = {"prompt_id": hashlib.sha256(str(p).encode()).hexdigest()[:32]}
        question = HOSTILE if p == 0 else f"How many are {p} and {p}?"
        rows["prompts"].append(
            prompt
            | {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": question},
                ],
                "split": "train",
                "source": "tests",
                "offline_completions": [],
                "metadata": json.dumps({"answer": 2 * p}),
                "conversational": True,
            }
        )
        rewards = [p + k / 10 + shift for k in range(num_ref)]
        for k, reward in enumerate(rewards):
            key = prompt | {"sample_index": k, "origin": "reference"}
            text = HOSTILE if p == 0 and k == 0 else f"I say {2 * p} ({k})"
            said = {
                "text": text,
                "token_ids": list(range(k, k + 3)),
                "finish_reason": "stop",
                "sampled_logprob": -1.0 - k,
            }
            components = [{"name": "right", "value": reward}]
            rows["completions"].append(key | said)
            rows["rewards"].append(key | {"reward": reward, "components": components, "error": None})
        each = {
            "sample_index": list(range(2)),
            "origin": ["reference"] * 2,
            "reward": rewards[:2],
            "quantile_reward": [0.0, 0.2],
            "quantile_low": [0.0, 0.1],
            "quantile_high": [0.5, 0.6],
        }
        shared = {"ref_mean": sum(rewards) / num_ref, "ref_std": 0.5}
        rows["quantiles"].append(prompt | shared | each | {"ref_rewards": rewards, "num_ref": num_ref})
        tokens = {
            "prompt_token_ids": [1, 2],
            "completion_token_ids": [[0, 1, 2], [1, 2, 3]],
            "ref_logprob": [-3.0, -4.0],
        }
        rows["shards"].append(prompt | shared | each | tokens | {"num_ref": num_ref - 1})
        for model, bonus in (("policy", 0.5), ("reference", 0.0)):
            rows["evaluation"].append(
                prompt
                | {
                    "model": model,
                    "sample_index": 0,
                    "text": f"evaluated {p} by {model}",
                    "token_ids": [0, 1, 2],
                    "finish_reason": "stop",
                    "reward": p + bonus,
                    "quantile_reward": 0.5 + bonus / 2,
                    "model_logprob": -2.0,
                    "ref_logprob": -3.0,
                    "model_token_logprobs": [-0.1, -1.5, -0.4],
                    "ref_token_logprobs": [-0.3, -0.2, -2.5],
                }
            )
    return rows


def commit_rows(
    store: Any, stage: str, name: str, rows: list[dict[str, Any]], parents: dict[str, str]
) -> Any:
    """Commit a part of these rows; one reject beside every part of rewards."""
    import pyarrow as pa

    from storage import SCHEMAS, PartKey, rejects_table

    schema = SCHEMAS[stage]
    extra = [pa.field(key, pa.list_(pa.float32())) for key in rows[0] if key not in schema.names]
    rejects = None
    if stage == "rewards":
        key = f"{rows[0]['prompt_id']}/reference/99"
        reject = {
            "stage": stage,
            "key": key,
            "reason": f"the reward failed: {HOSTILE}",
            "prompt_id": rows[0]["prompt_id"],
        }
        rejects = rejects_table([reject])
    table = pa.Table.from_pylist(rows, schema=pa.schema([*schema, *extra]))
    return store.commit_part(
        PartKey(stage, "tests", f"{stage}-{name}"), table, rejects=rejects, parents=parents
    )


def commit_policy(store: Any) -> Any:
    """A model folder without weights: what training logged, and a tokenizer whose token 1 is markup."""
    import polars as pl
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from storage import PartKey

    words = {"I": 0, "<b>say</b>": 1, "four": 2, "five": 3, "six": 4, "seven": 5, "[UNK]": 6}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
        pl.DataFrame({"step": [1, 2, 3], "loss": [1.0, 0.5, 0.25]}).write_parquet(folder / "metrics.parquet")
        return store.commit_folder(PartKey("policy", "tests", "policy"), folder)


def make_rows(count: int) -> list[dict[str, str]]:
    rng = random.Random(7)
    rows = []
    for number in range(count):
        letters = [rng.choice("abcdefgh") for _ in range(4)]
        rows.append(
            {
                "prompt": f"say {number}: {' '.join(letters)}",
                "chosen": " ".join(letters),
                "rejected": " ".join(reversed(letters)),
                "answer": "".join(letters),
            }
        )
    return rows


def write_lines(path: Path, rows: list[Any]) -> None:
    """One JSON object a line; a string is written as it is, so that a line can be broken."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
