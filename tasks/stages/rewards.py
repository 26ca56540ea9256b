"""The `rewards` stage: score every completion with the configured rewards and combine them by weight.

Several small parts are scored together, as a reward model's batches are fuller the more it may choose from; each is
committed on its own all the same.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from qrpo.config import keyed
from qrpo.rewards import Reward, Score, combine, identity, open_reward
from storage import PartKey, PartRecord, Store, fingerprint
from storage.checks import at_least, finite, one_of, rule
from storage.table import Table, column
from tasks.answers import StoredAnswers
from tasks.engines import keep
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.reuse import reusable_rows
from tasks.stages.completions import ORIGINS
from tasks.stages.prompts import prompt_rows
from tasks.work import Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["TABLE", "Scorer", "compute", "plan", "reward_settings"]

VERSION = 1

TABLE = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column("sample_index", pa.int32()),
            column("origin", pa.string()),
            column("reward", pa.float32(), null=True),
            column(
                "components",
                pa.list_(pa.struct([column("name", pa.string()), column("value", pa.float32(), null=True)])),
                null=True,
            ),
            column("error", pa.string(), null=True),
        ]
    ),
    key=("prompt_id", "origin", "sample_index"),
    checks=(
        one_of("origin", ORIGINS),
        at_least("sample_index", 0),
        finite("reward"),
        rule(
            "must have either a reward or an error, and not both",
            lambda rows: pc.equal(rows["reward"].is_null(), rows["error"].is_null()),
        ),
    ),
)


def plan(config: "PipelineConfig", plans: Mapping[str, StagePlan], store: Store) -> StagePlan:
    """One part for every completions part."""
    settings, outside = reward_settings(config)
    family = make_family("rewards", VERSION, settings, outside)
    completions = plans["completions"]
    parts = tuple(
        PartPlan(
            PartKey("rewards", family, fingerprint([family, part.key.fingerprint, part.slice["prompts"]])),
            (part.key, next(key for key in part.inputs if key.stage == "prompts")),
            part.slice,
        )
        for part in completions.parts
    )
    return StagePlan("rewards", family, settings, outside, parts, {"completions": completions.fingerprint})


def reward_settings(config: "PipelineConfig") -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the rewards, and the identity of what they call: a function's source, a model's files."""
    settings = {reward.name: keyed(reward) for reward in config.rewards}
    return settings, {reward.name: identity(reward) for reward in config.rewards}


class Scorer:
    """All configured rewards, opened once, applied to completions with their prompts.

    Answers that cost money are kept in `store`, where there is one.
    """

    def __init__(self, config: "PipelineConfig", log: Path, store: Store | None = None) -> None:
        answers = StoredAnswers(store) if store is not None else None
        self._rewards = [open_reward(reward, log=log, answers=answers) for reward in config.rewards]
        self._names = [reward.name for reward in config.rewards]
        self._weights = [reward.weight for reward in config.rewards]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child processes."""
        for reward in self._rewards:
            reward.close()

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score a row; a row has `messages`, `conversational`, `metadata` (JSON), `text` and maybe `token_ids`."""
        if not rows:
            return []
        columns = _columns([json.loads(row["metadata"]) for row in rows])
        if "token_ids" in rows[0]:
            columns["completion_ids"] = [row["token_ids"] for row in rows]  # TRL's name
        prompts = [row["messages"] for row in rows]
        texts = [row["text"] for row in rows]
        forms = [row["conversational"] for row in rows]

        def ask(reward: Reward) -> list[Score]:
            return reward.score(prompts, texts, columns, conversational=forms)

        if len(self._rewards) == 1:
            scores = [ask(self._rewards[0])]
        else:  # side by side: a judge only waits, while a model computes
            with ThreadPoolExecutor(len(self._rewards), thread_name_prefix="rewards") as threads:
                scores = list(threads.map(ask, self._rewards))
        return combine(list(zip(self._names, self._weights, scores, strict=True)))


_TOGETHER = 4096  # completions to score in one call, so many at least while there are parts left


@dataclass(frozen=True)
class _Part:
    """A part with its rows, and those of its rewards that were computed before, by the row's digest."""

    plan: PartPlan
    started: float
    rows: list[dict[str, Any]]
    kept: dict[str, dict[str, Any]]

    @property
    def fresh(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["input_digest"] not in self.kept]


def compute(work: Work) -> Iterator[PartRecord]:
    """Score the group, some parts together, and commit each part. The rewards are kept for the next group."""
    scorer = keep(
        (work.config.rewards, work.store.url, work.log), lambda: Scorer(work.config, work.log, work.store)
    )
    waiting: list[_Part] = []
    for plan in work.parts:
        waiting.append(_read_part(work, plan))
        if sum(len(part.fresh) for part in waiting) >= _TOGETHER:
            yield from _score_parts(work, waiting, scorer)
            waiting = []
    yield from _score_parts(work, waiting, scorer)


def _read_part(work: Work, part: PartPlan) -> _Part:
    started = time.monotonic()
    kept: dict[str, dict[str, Any]] = {}
    reusable = reusable_rows(work, part, on=["input_digest"])
    if not reusable.is_empty():
        kept = {row["input_digest"]: row for row in reusable.to_dicts() if row["error"] is None}
    return _Part(part, started, _inputs(work, part), kept)


def _score_parts(work: Work, parts: Sequence[_Part], scorer: Scorer) -> Iterator[PartRecord]:
    fresh = [row for part in parts for row in part.fresh]
    scores = dict(zip((row["input_digest"] for row in fresh), scorer.score(fresh), strict=True))
    for part in parts:
        yield _commit(work, part, scores)


def _commit(work: Work, part: _Part, scores: Mapping[str, Score]) -> PartRecord:
    table, rejects = [], []
    for row in part.rows:
        old = part.kept.get(row["input_digest"])
        score = _score_of(old) if old is not None else scores[row["input_digest"]]
        table.append(_row(row, score))
        if score.error is not None:
            key = f"{row['prompt_id']}/{row['origin']}/{row['sample_index']}"
            rejects.append({"key": key, "reason": score.error, "prompt_id": row["prompt_id"]})
    return work.commit(
        part.plan,
        pa.Table.from_pylist(table, schema=_SCHEMA),
        table=TABLE,
        started=part.started,
        rejects=rejects,
    )


_SCHEMA = TABLE.schema.append(column("input_digest", pa.string()))


def _inputs(work: Work, part: PartPlan) -> list[dict[str, Any]]:
    columns = ["prompt_id", "sample_index", "origin", "text"]
    if any(reward.kind == "function" for reward in work.config.rewards):  # TRL passes them to functions
        columns.append("token_ids")
    completions = work.store.read_part(work.input(part, "completions"), columns=columns).to_pylist()
    prompts = prompt_rows(work, part, "messages", "conversational", "metadata")
    rows = [{**prompts[row["prompt_id"]], **row} for row in completions]
    for row in rows:
        row["input_digest"] = _digest(row)
    return rows


def _digest(row: Mapping[str, Any]) -> str:
    """What a reward can see of a row; two rows with the same digest have the same reward."""
    seen = [
        row["prompt_id"],
        row["conversational"],
        row["metadata"],
        row["text"],
        row["origin"],
        row["sample_index"],
    ]
    if "token_ids" in row:
        seen.append(row["token_ids"])
    return hashlib.sha256(json.dumps(seen, ensure_ascii=False).encode()).hexdigest()[:32]


def _columns(metadata: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = {name for row in metadata for name in row}
    return {name: [row.get(name) for row in metadata] for name in sorted(names)}


def _score_of(row: Mapping[str, Any]) -> Score:
    return Score(row["reward"], None, tuple((c["name"], c["value"]) for c in row["components"]))


def _row(row: Mapping[str, Any], score: Score) -> dict[str, Any]:
    return {
        "prompt_id": row["prompt_id"],
        "sample_index": row["sample_index"],
        "origin": row["origin"],
        "reward": score.reward,
        "components": [{"name": name, "value": value} for name, value in score.components],
        "error": score.error,
        "input_digest": row["input_digest"],
    }
