"""The `rewards` stage: score every completion with the configured rewards and combine them by weight."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import polars as pl
import pyarrow as pa

from qrpo.config import keyed
from qrpo.rewards import Score, combine, identity, open_reward
from storage import PartKey, PartRecord, Store, fingerprint
from storage.tables import SCHEMAS
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.prompts import prompt_rows
from tasks.salvage import reusable_rows
from tasks.work import Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["Scorer", "compute", "plan", "reward_settings"]

VERSION = 1


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
    """All configured rewards, opened once (each in a child process), applied to completions with their prompts."""

    def __init__(self, config: "PipelineConfig", log: Path) -> None:
        self._rewards = [open_reward(reward, log=log) for reward in config.rewards]
        self._names = [reward.name for reward in config.rewards]
        self._weights = [reward.weight for reward in config.rewards]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for reward in self._rewards:
            reward.close()

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score a row; a row has `messages`, `conversational`, `metadata` (JSON) and `text`."""
        if not rows:
            return []
        columns = _columns([json.loads(row["metadata"]) for row in rows])
        prompts = [row["messages"] for row in rows]
        texts = [row["text"] for row in rows]
        forms = [row["conversational"] for row in rows]
        scores = [reward.score(prompts, texts, columns, conversational=forms) for reward in self._rewards]
        return combine(list(zip(self._names, self._weights, scores, strict=True)))


def compute(work: Work) -> Iterator[PartRecord]:
    """Score the group part by part. The rewards themselves run in child processes."""
    with Scorer(work.config, work.log) as scorer:
        for part in work.parts:
            yield _score_part(work, part, scorer)


def _score_part(work: Work, part: PartPlan, scorer: Scorer) -> PartRecord:
    started = time.monotonic()
    rows = _inputs(work, part)
    kept: dict[str, dict[str, Any]] = {}
    reusable = reusable_rows(work, part, on=["input_digest"])
    if not reusable.is_empty():
        kept = {row["input_digest"]: row for row in reusable.filter(pl.col("error").is_null()).to_dicts()}
    fresh = [row for row in rows if row["input_digest"] not in kept]
    scores = dict(zip((row["input_digest"] for row in fresh), scorer.score(fresh), strict=True))
    table, rejects = [], []
    for row in rows:
        old = kept.get(row["input_digest"])
        score = _score_of(old) if old is not None else scores[row["input_digest"]]
        table.append(_row(row, score))
        if score.error is not None:
            key = f"{row['prompt_id']}/{row['origin']}/{row['sample_index']}"
            rejects.append({"key": key, "reason": score.error, "prompt_id": row["prompt_id"]})
    return work.commit(part, pa.Table.from_pylist(table, schema=_SCHEMA), started=started, rejects=rejects)


_SCHEMA = SCHEMAS["rewards"].append(pa.field("input_digest", pa.string(), nullable=False))


def _inputs(work: Work, part: PartPlan) -> list[dict[str, Any]]:
    completions = work.store.read_part(
        work.input(part, "completions"), columns=["prompt_id", "sample_index", "origin", "text"]
    ).to_pylist()
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
