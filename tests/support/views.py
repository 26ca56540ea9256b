"""Artifacts written by hand for tests of the views, without computing anything, and what several of those tests do."""

import hashlib
import http.client
import json
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import uvicorn

from flows.views.browse.server import Guard, browse_app
from storage import Manifest, PartKey, PartRecord, Store, manifest_of, rejects_table
from tasks.stages import TABLES
from tests.support.flows import invoke

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></td></table></pre>"
    "[bold]b[/bold] {{ 7*7 }} \x1b[31mred\x1b]0;owned\x07 \u202edesrever\u202c \x00"
)
"""Markup, scripts, templates, terminal commands and direction marks, as a model could write them."""
PROMPT = "5feceb66ffc86f38d952786c6d696c79"
"""The id of prompt 0 of `write_artifacts`, whose text is hostile."""

_COMPLETION = {"sample_index": 0, "origin": "reference"}
_LISTS = {
    "sample_index": [0],
    "origin": ["reference"],
    "reward": [0.0],
    "quantile_reward": [0.5],
    "quantile_low": [0.2],
    "quantile_high": [0.8],
    "ref_mean": 0.0,
    "ref_std": 1.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "prompts": {
        "messages": [],
        "split": "train",
        "source": "tests",
        "offline_completions": [],
        "metadata": "{}",
        "conversational": True,
    },
    "completions": {
        **_COMPLETION,
        "text": "",
        "token_ids": [1],
        "finish_reason": None,
        "sampled_logprob": None,
    },
    "rewards": {**_COMPLETION, "reward": None, "components": None, "error": None},
    "quantiles": {**_LISTS, "num_excluded": 0, "ref_rewards": [], "num_ref": 1},
    "shards": {**_LISTS, "prompt_token_ids": [1, 2], "num_ref": 1},
    "evaluation": {"sample_index": 0, "text": "", "token_ids": [0, 1, 2], "finish_reason": "stop"},
}


def row(stage: str, prompt_id: str = "p", **values: Any) -> dict[str, Any]:
    """A row of a stage, with defaults for what is not given."""
    return {"prompt_id": prompt_id, **_DEFAULTS[stage], **values}


def table(stage: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows with the stage's schema; further columns hold lists of floats."""
    extra = [
        pa.field(key, pa.list_(pa.float32())) for key in rows[0] if key not in TABLES[stage].schema.names
    ]
    return pa.Table.from_pylist(list(rows), schema=pa.schema([*TABLES[stage].schema, *extra]))


def rewards_table(rewards: Any, first: int = 0) -> pa.Table:
    """One reward per prompt `p<number>`."""
    nulls = {"components": TABLES["rewards"].schema.field("components").type, "error": pa.string()}
    count = len(rewards)
    return pa.table(
        {
            "prompt_id": [f"p{first + number}" for number in range(count)],
            "sample_index": pa.array([0] * count, pa.int32()),
            "origin": ["reference"] * count,
            "reward": pa.array(rewards, pa.float32()),
            **{name: pa.nulls(count, kind) for name, kind in nulls.items()},
        }
    )


def commit(store: Store, stage: str, tables: Sequence[pa.Table], run: str = "one") -> Manifest:
    """One artifact with one part per table, as the only stage of a run."""
    parts = [store.commit_part(PartKey(stage, "tests", f"part{n}"), part) for n, part in enumerate(tables)]
    manifest = store.commit_manifest(manifest_of(stage, "tests", parts))
    store.write_run(run, {"stages": {stage: {"fingerprint": manifest.fingerprint}}})
    return manifest


def write_artifacts(
    store: Store,
    run: str,
    *,
    prompts: int = 12,
    part_size: int = 4,
    num_ref: int = 6,
    reward_shift: float = 0.0,
) -> None:
    """Write every stage of a run, a few prompts per part; the first prompt and completion are hostile.

    `reward_shift` is added to the rewards of the parts in the second half: those differ between two runs.
    """
    made: dict[str, list[PartRecord]] = {}
    for first in range(0, prompts, part_size):
        last = min(first + part_size, prompts)
        shift = reward_shift if 2 * first >= prompts else 0.0
        above: dict[str, str] = {}
        for stage, rows in _rows(range(first, last), num_ref, shift).items():
            name = f"{stage}-{first}-{last}-{num_ref}-{shift}"
            record = _commit_rows(store, stage, name, rows, above)
            made.setdefault(stage, []).append(record)
            above = above | {record.fingerprint: record.digest}
    made["policy"] = [_commit_policy(store)]
    stages: dict[str, Any] = {}
    parents: dict[str, str] = {}
    for stage, records in made.items():
        inputs = {"source": ["digest-of-the-source"]} if stage == "prompts" else {}
        manifest = store.commit_manifest(manifest_of(stage, "tests", records, parents=parents, inputs=inputs))
        parents = {stage: manifest.fingerprint}
        stages[stage] = {"fingerprint": manifest.fingerprint}
    store.write_run(run, {"stages": stages, "updated": "2026-11-24T12:00:00Z"})


def _rows(numbers: range, num_ref: int, shift: float) -> dict[str, list[dict[str, Any]]]:
    """Rows of the stages for these prompts; the reward of sample k of prompt p is p + k / 10."""
    rows: dict[str, list[dict[str, Any]]] = {stage: [] for stage in _DEFAULTS}
    for p in numbers:

        def add(stage: str, _p: int = p, **values: Any) -> None:
            prompt_id = hashlib.sha256(str(_p).encode()).hexdigest()[:32]
            rows[stage].append(row(stage, prompt_id, **values))

        question = HOSTILE if p == 0 else f"How many are {p} and {p}?"
        messages = [("system", "Be brief."), ("user", question)]
        said = [{"role": role, "content": content} for role, content in messages]
        add("prompts", messages=said, metadata=json.dumps({"answer": 2 * p}))
        rewards = [p + k / 10 + shift for k in range(num_ref)]
        for k, reward in enumerate(rewards):
            text = HOSTILE if p == 0 and k == 0 else f"I say {2 * p} ({k})"
            tokens = {"token_ids": list(range(k, k + 3)), "finish_reason": "stop"}
            add("completions", sample_index=k, text=text, sampled_logprob=-1.0 - k, **tokens)
            components = [{"name": "right", "value": reward}]
            add("rewards", sample_index=k, reward=reward, components=components)
        trained = {
            "sample_index": [0, 1],
            "origin": ["reference"] * 2,
            "reward": rewards[:2],
            "quantile_reward": [0.0, 0.2],
            "quantile_low": [0.0, 0.1],
            "quantile_high": [0.5, 0.6],
            "ref_mean": sum(rewards) / num_ref,
            "ref_std": 0.5,
        }
        add("quantiles", **trained, ref_rewards=rewards, num_ref=num_ref)
        tokens = {"completion_token_ids": [[0, 1, 2], [1, 2, 3]], "ref_logprob": [-3.0, -4.0]}
        add("shards", **trained, **tokens, num_ref=num_ref - 1)
        for model, bonus in (("policy", 0.5), ("reference", 0.0)):
            add(
                "evaluation",
                model=model,
                text=f"evaluated {p} by {model}",
                reward=p + bonus,
                quantile_reward=0.5 + bonus / 2,
                model_logprob=-2.0,
                ref_logprob=-3.0,
                model_token_logprobs=[-0.1, -1.5, -0.4],
                ref_token_logprobs=[-0.3, -0.2, -2.5],
            )
    return rows


def _commit_rows(
    store: Store, stage: str, name: str, rows: list[dict[str, Any]], parents: dict[str, str]
) -> PartRecord:
    """Commit a part of these rows; every part of rewards has one reject."""
    rejects = None
    if stage == "rewards":
        prompt_id = rows[0]["prompt_id"]
        reject = {"key": f"{prompt_id}/reference/99", "reason": f"the reward failed: {HOSTILE}"}
        rejects = rejects_table([{"stage": stage, "prompt_id": prompt_id, **reject}])
    return store.commit_part(
        PartKey(stage, "tests", name), table(stage, rows), rejects=rejects, parents=parents
    )


def _commit_policy(store: Store) -> PartRecord:
    """A model folder without weights: what training logged, and a tokenizer whose token 1 is markup."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"I": 0, "<b>say</b>": 1, "four": 2, "five": 3, "six": 4, "seven": 5, "[UNK]": 6}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
        pl.DataFrame({"step": [1, 2, 3], "loss": [1.0, 0.5, 0.25]}).write_parquet(folder / "metrics.parquet")
        return store.commit_folder(PartKey("policy", "tests", "policy"), folder)


def qrpo(*arguments: Any) -> Any:
    """The `qrpo` command in this process: `.exit_code`, `.stdout`, `.stderr`; never a traceback."""
    result = invoke(*arguments)
    assert "Traceback" not in result.stderr
    return result


def qrpo_json(*arguments: Any) -> Any:
    """What the `qrpo` command prints with `--json`."""
    result = qrpo(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


TOKEN = "a-token-of-the-tests"


@contextmanager
def serving(store: Store) -> Iterator[int]:
    """Serve a store in this process as `qrpo browse` does, to this machine; the port."""
    app = Guard(browse_app(store), token=TOKEN, hosts=("localhost", "127.0.0.1", "[::1]"))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield int(listening.getsockname()[1])
    server.should_exit = True
    thread.join(30)


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of an answer of the server at a port of this machine; with the token unless there is a Cookie."""
    headers.setdefault("Cookie", f"qrpo_browse={TOKEN}")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()
