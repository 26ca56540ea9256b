"""The `rewards` stage: score every completion with the configured rewards and combine them by
weight.

Several small parts are scored together, so that a reward model's batches are full. Each is
committed separately.
"""

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from qrpo.config import keyed
from qrpo.errors import EngineError, RewardError
from qrpo.rewards import Reward, RewardConfig, Score, combine, open_reward
from storage import PartRecord, Store, fingerprint
from storage.checks import at_least, finite, one_of, rule
from storage.table import Table, column
from tasks.answers import StoredAnswers
from tasks.engines import keep
from tasks.models import known_identity
from tasks.plan import PartPlan, StagePlan, Upstream, make_family, part_key
from tasks.reuse import noted_family, reusable_rows
from tasks.stage import RowReuse, Stage
from tasks.stages.completions import ORIGINS, samples_of
from tasks.stages.prompts import content, prompt_rows, row_hash
from tasks.work import Work

if TYPE_CHECKING:
    import polars as pl

VERSION = 2  # 1 rounded rewards to float32 and had no notes

TABLE = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column("sample_index", pa.int32()),
            column("origin", pa.string()),
            column("reward", pa.float64(), null=True),
            column(
                "components",
                pa.list_(pa.struct([column("name", pa.string()), column("value", pa.float64(), null=True)])),
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

log = logging.getLogger("qrpo")

Known = Mapping[str, Score]
"""Scores that one row's rewards had before, by the reward's name."""


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    rewards: tuple[RewardConfig, ...]


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """One part for every completions part."""
    hashed, outside = reward_settings(settings.rewards, upstream.store)
    family = make_family("rewards", VERSION, hashed, outside)
    completions = upstream["completions"]
    prompts = {part.key.fingerprint: part.key for part in upstream.prompt_parts()}
    parts = tuple(
        PartPlan(
            part_key("rewards", family, part.key.fingerprint, part.slice["prompts"]),
            (part.key, prompts[part.slice["prompts"]]),
            {**part.slice, "samples": part.key.family},
        )
        for part in completions.parts
    )
    rows = {
        split: fingerprint([family, asked, content(upstream, split, "seen_sum")])
        for split, asked in completions.rows.items()
    }
    return StagePlan("rewards", family, hashed, outside, parts, upstream.parents("completions"), rows)


def reward_gpus(rewards: Sequence[RewardConfig]) -> int:
    """GPUs that the largest reward model needs."""
    return max((getattr(reward, "tensor_parallel_size", 1) for reward in rewards), default=1)


def reward_settings(
    rewards: Sequence[RewardConfig], store: Store | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the rewards, and the identity of what they call: a function's source, a
    model's files as `store` knows them.

    A model's scores are float32. All other rewards are float64, and version 1 rounded them, so its
    values may not serve.
    """
    outside = {
        reward.name: {**reward.identity(), **({} if reward.kind == "model" else {"precision": "float64"})}
        for reward in rewards
    }
    for reward in rewards:
        if reward.kind == "model" and store is not None:
            outside[reward.name]["model"] = known_identity(reward.model, store, "rewards", "evaluation")
    return {reward.name: keyed(reward) for reward in rewards}, outside


def reward_identities(settings: Mapping[str, Any], outside: Mapping[str, Any]) -> dict[str, str]:
    """Name -> hash of what decides a reward's values: not its weight, and not its name."""
    return {
        name: fingerprint(
            [{key: value for key, value in section.items() if key not in ("name", "weight")}, outside[name]]
        )
        for name, section in settings.items()
    }


def missing_rewards(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> int:
    """How many of our rewards a row of the other family has no value of. Both are
    `{"settings", "outside"}` of rewards."""
    values = set(reward_identities(theirs["settings"], theirs["outside"]).values()) if theirs else set()
    return sum(value not in values for value in reward_identities(ours["settings"], ours["outside"]).values())


class Scorer:
    """All configured rewards, opened once, applied to completions with their prompts.

    Answers that cost money are kept in `store`, where there is one.
    """

    def __init__(self, rewards: Sequence[RewardConfig], log: Path, store: Store | None = None) -> None:
        answers = StoredAnswers(store) if store is not None else None
        self._configs = rewards
        self._rewards = [open_reward(reward, log=log, answers=answers) for reward in rewards]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child processes."""
        for reward in self._rewards:
            reward.close()

    def score(self, rows: Sequence[Mapping[str, Any]], known: Sequence[Known] | None = None) -> list[Score]:
        """One score a row; a row has `messages`, `conversational`, `metadata` (JSON), `text` and
        maybe `token_ids`.

        `known` has for every row the values that need not be computed again.
        """
        if not rows:
            return []
        known = known or [{}] * len(rows)

        def ask(reward: Reward, config: RewardConfig) -> tuple[str, float, list[Score]]:
            name = config.name
            fresh = [row for row, values in zip(rows, known, strict=True) if name not in values]
            scores = iter(_ask(reward, fresh, watched=not config.weight) if fresh else ())
            own = [values[name] if name in values else next(scores) for values in known]
            return name, config.weight, own

        if len(self._rewards) == 1:
            return combine([ask(self._rewards[0], self._configs[0])])
        # side by side: a judge only waits, while a model computes
        with ThreadPoolExecutor(len(self._rewards), thread_name_prefix="rewards") as threads:
            return combine(list(threads.map(ask, self._rewards, self._configs)))


def _ask(reward: Reward, rows: Sequence[Mapping[str, Any]], *, watched: bool) -> list[Score]:
    """One score a row; a reward that is only watched fails on rows instead of ending the stage."""
    metadata = [json.loads(row["metadata"]) for row in rows]
    names = sorted({name for one in metadata for name in one})
    columns = {name: [one.get(name) for one in metadata] for name in names}
    if "token_ids" in rows[0]:
        columns["completion_ids"] = [row["token_ids"] for row in rows]  # TRL's name
    prompts = [row["messages"] for row in rows]
    texts = [row["text"] for row in rows]
    forms = [row["conversational"] for row in rows]
    try:
        return reward.score(prompts, texts, columns, conversational=forms)
    except (RewardError, EngineError) as error:
        if not watched:
            raise
        log.warning("a reward of weight 0 failed on %d completions and is ignored: %s", len(rows), error)
        return [Score(None, str(error))] * len(rows)


_TOGETHER = 4096  # minimum completions per call, except in the last one


@dataclass(frozen=True)
class _Part:
    """A part with its rows, and for each the values of its rewards that were computed before."""

    plan: PartPlan
    started: float
    rows: list[dict[str, Any]]
    known: list[Known]


def compute(work: Work[Settings]) -> Iterator[PartRecord]:
    """Score the group, some parts together, and commit each part. The rewards are kept for the next
    group."""
    rewards = work.settings.rewards
    scorer = keep((rewards, work.store.url, work.log), lambda: Scorer(rewards, work.log, work.store))
    waiting: list[_Part] = []
    to_score = 0
    for plan in work.parts:
        part = _read_part(work, plan)
        waiting.append(part)
        to_score += sum(len(values) < len(rewards) for values in part.known)
        if to_score < _TOGETHER and plan is not work.parts[-1]:
            continue
        rows = [row for part in waiting for row in part.rows]
        scores = iter(scorer.score(rows, [values for part in waiting for values in part.known]))
        for part in waiting:
            yield _commit(work, part, [next(scores) for _ in part.rows])
        waiting, to_score = [], 0


def _read_part(work: Work[Settings], part: PartPlan) -> _Part:
    started, rewards = time.monotonic(), work.settings.rewards
    columns = ["prompt_id", "sample_index", "origin", "text"]
    see_tokens = sees_tokens(rewards)
    if see_tokens or part.reuse:
        columns.append("token_ids")
    prompts = prompt_rows(work, part, "messages", "conversational", "metadata")
    completions = work.store.read_part(work.input(part, "completions"), columns=columns).to_pylist()
    rows = [{**prompts[row["prompt_id"]], **row} for row in completions]
    for row in rows:
        row["input_digest"] = input_digest(row, tokens=see_tokens)
    reusable = reusable_rows(work, part, on=["input_digest"])
    return _Part(part, started, rows, known_scores(rewards, rows, reusable, work.store, "rewards"))


def known_scores(
    rewards: Sequence[RewardConfig],
    rows: Sequence[Mapping[str, Any]],
    committed: "pl.DataFrame",
    store: Store,
    stage: str,
) -> list[Known]:
    """For every row, the values of these rewards that committed rows of any family have
    (`reusable_rows`).

    A function may see the tokens of a completion, so its values hold for equal tokens; other
    rewards see the text alone.
    """
    known = _committed_scores(rewards, committed, store, stage)
    if not known:
        return [{}] * len(rows)
    see_tokens = {reward.name for reward in rewards if reward.kind == "function"}
    found: list[Known] = []
    for row in rows:
        by_text = known.get(input_digest(row, tokens=False), {})
        by_tokens = known.get(input_digest(row, tokens=True), {})
        found.append({name: value for name, value in by_text.items() if name not in see_tokens} | by_tokens)
    return found


def _committed_scores(
    rewards: Sequence[RewardConfig], rows: "pl.DataFrame", store: Store, stage: str
) -> dict[str, dict[str, Score]]:
    """Scores of these rewards by `input_digest` and the reward's present name.

    A row that failed says nothing. In the others, a component that is missing did not apply, and
    one that is null failed.
    """
    known: dict[str, dict[str, Score]] = {}
    if rows.is_empty():
        return known
    ours = reward_identities(*reward_settings(rewards, store))
    usable = rows.filter(rows["error"].is_null()) if "error" in rows.columns else rows
    for (family,), group in usable.group_by("family"):
        noted = noted_family(store, stage, str(family)) or {}
        theirs = reward_identities(*_rewards_of(noted)) if noted else ours
        names = {name: [other for other, value in theirs.items() if value == ours[name]] for name in ours}
        a_note = re.compile(rf"(?:^|; )({'|'.join(map(re.escape, theirs))}): ")  # as `combine` writes them
        read = [name for name in ("input_digest", "components", "note") if name in group.columns]
        for row in group.select(read).iter_rows(named=True):
            _, *parts = a_note.split(row.get("note") or "")
            notes = dict(zip(parts[::2], parts[1::2], strict=True))
            values = {item["name"]: item["value"] for item in row["components"] or ()}
            found = known.setdefault(row["input_digest"], {})
            scored = {name: other[0] for name, other in names.items() if other}
            failed = {name for name, value in values.items() if value is None}
            found |= {
                name: Score(values.get(other), note=notes.get(other, ""))
                for name, other in scored.items()
                if other not in failed
            }
    return known


def _rewards_of(family: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The rewards' settings and identities in the note of a rewards or evaluation family."""
    settings, outside = family["settings"], family["outside"]
    return settings.get("rewards", settings), outside.get("rewards", outside)


def _commit(work: Work[Settings], part: _Part, scores: Sequence[Score]) -> PartRecord:
    table, rejects = [], []
    _warn_of_broken_tests(part.rows, scores)
    for row, score in zip(part.rows, scores, strict=True):
        components = [{"name": name, "value": value} for name, value in score.components]
        scored = {
            "reward": score.reward,
            "components": components,
            "error": score.error,
            "note": score.note or None,
        }
        table.append({**row, **scored})
        if score.error is not None:
            key = f"{row['prompt_id']}/{row['origin']}/{row['sample_index']}"
            rejects.append({"key": key, "reason": score.error, "prompt_id": row["prompt_id"]})
    reused = sum(map(len, part.known))
    return work.commit(
        part.plan,
        pa.Table.from_pylist(table, schema=_SCHEMA),
        table=TABLE,
        started=part.started,
        rejects=rejects,
        metadata={"computed": len(part.rows) * len(work.settings.rewards) - reused, "reused": reused},
    )


def _warn_of_broken_tests(rows: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> None:
    """Name the prompts whose completions all have one reward that the dataset's own answer fails
    for."""
    prompts: dict[str, list[tuple[str, Score]]] = {}
    for row, score in zip(rows, scores, strict=True):
        prompts.setdefault(row["prompt_id"], []).append((row["origin"], score))
    for prompt_id, scored in prompts.items():
        notes = [score.note for origin, score in scored if origin == "offline"]
        failed = next((note for note in notes if note and "weak tests" not in note), "")
        rewards = {score.reward for _, score in scored}
        if failed and len(rewards) == 1 and len(scored) > 1:
            log.warning(
                "prompt %s: all %d completions have the reward %s. The reference solution fails its own tests: %s",
                *(prompt_id, len(scored), rewards.pop(), failed),
            )


_SCHEMA = TABLE.schema.append(column("input_digest", pa.string())).append(
    column("note", pa.string(), null=True)
)


def sees_tokens(rewards: Sequence[RewardConfig]) -> bool:
    """Whether any reward is a function, which gets the tokens as TRL passes them."""
    return any(reward.kind == "function" for reward in rewards)


def input_digest(row: Mapping[str, Any], tokens: bool) -> str:
    """What a reward can see of a row; two rows with the same digest have the same reward."""
    names = ("prompt_id", "conversational", "metadata", "text", "origin", "sample_index")
    return row_hash([*(row[name] for name in names), *([row["token_ids"]] if tokens else [])])


STAGE = Stage(
    name="rewards",
    version=VERSION,
    summary="Score every completion: r(x, y).",
    unit="completions",
    parents=("completions",),
    settings=Settings,
    table=TABLE,
    plan=plan,
    compute=compute,
    gpus=lambda settings: reward_gpus(settings.rewards),
    reuse=RowReuse(
        "scores",
        lambda settings, part, prompts: samples_of(part, prompts),
        ("prompt_id", "origin", "sample_index"),
        unless="error",
        versions=(1,),  # `reward_settings` tells which of its values may
        serves=lambda theirs, ours: missing_rewards(ours, theirs) < missing_rewards(ours, None),
        matches=lambda part, metadata: metadata.get("samples") in (None, part.slice["samples"]),
        costs=lambda ours, theirs, same: missing_rewards(ours, theirs if same else None),
    ),
    lost_rows=lambda manifest, store: (manifest.rejects, manifest.rows),  # each keeps its row
    chart="tasks.charts:completion_rewards",
)
