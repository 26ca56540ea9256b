"""The `quantiles` stage: per-prompt reference distributions, and the quantile reward of every
training completion under them.

Arrays end in `P` prompts, `N` reference rewards (all prompts' in one row, cut by offsets), `K`
training completions (likewise).
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from qrpo.config import Section, keyed
from qrpo.method.quantiles import quantile_bounds, quantile_rewards
from storage import PartRecord, Store, fingerprint
from storage.checks import ascending, at_least, finite, in_range, length_equals, lists_agree, ordered
from storage.table import Table, column
from tasks.plan import PartPlan, StagePlan, Upstream, make_family, part_key
from tasks.stage import Stage, setting
from tasks.work import Work

VERSION = 1

TRAINING_COLUMNS = (
    column("sample_index", pa.list_(pa.int32())),
    column("origin", pa.list_(pa.string())),
    column("reward", pa.list_(pa.float64())),
    column("quantile_reward", pa.list_(pa.float32())),
    column("quantile_low", pa.list_(pa.float32())),
    column("quantile_high", pa.list_(pa.float32())),
)
"""List columns with one item per training completion, in this table and in that of `shards`."""

TRAINING_CHECKS = (
    lists_agree(*(field.name for field in TRAINING_COLUMNS)),
    at_least("num_ref", 1),
    finite("reward"),
    in_range("quantile_reward", 0, 1),
    in_range("quantile_low", 0, 1),
    in_range("quantile_high", 0, 1),
    ordered("quantile_low", "quantile_high"),
)
"""Checks on these columns."""

TABLE = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column("ref_rewards", pa.list_(pa.float64())),
            column("num_ref", pa.int32()),
            column("ref_mean", pa.float64(), null=True),
            column("ref_std", pa.float64(), null=True),
            column("num_excluded", pa.int32()),
            *TRAINING_COLUMNS,
        ]
    ),
    key=("prompt_id",),
    checks=(
        *TRAINING_CHECKS,
        length_equals("ref_rewards", "num_ref"),
        finite("ref_rewards"),
        ascending("ref_rewards"),
    ),
)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


TrainOn = Literal["reference", "offline", "both", "policy"]


class QuantilesConfig(Section):
    """Which completions are trained on, and how their rewards become quantiles."""

    train_on: TrainOn = "reference"
    """Train on the reference's own samples, on the dataset's completions, or on both; in a later
    round, on the policy's samples."""
    num_completions: int | None = Field(None, ge=1)
    """How many reference samples of each prompt are trained on; null for all of them."""
    num_ref: int | None = Field(None, ge=1)
    """Take the quantiles of training completions among this many reference samples that are not
    trained on, the first after `num_completions`; null for all samples of the prompt but the
    completion itself. Shows what more samples are worth."""
    ties: Literal["weak", "strict", "mid", "randomized"] = "weak"
    """How equal rewards count: `weak` is the paper's P(s <= r)."""
    equal_rewards: Literal["exclude", "keep"] = "exclude"
    """A training completion whose reward equals every reference reward of its prompt has no rank:
    `ties` alone decides its quantile, and `weak` raises the probability of each completion of such
    a prompt. `exclude` does not train on it; `keep` is the paper's."""
    self_exclusion: bool = True
    """Leave a training completion that is itself a reference sample out of its own reference
    set."""
    confidence: float = Field(0.9, gt=0.0, lt=1.0)
    """Coverage of `quantile_low` to `quantile_high`."""


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    section: QuantilesConfig = setting("quantiles")
    seed: int = setting("seed")


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """One part for every prompts part, over all its rewards. Held-out prompts have no training
    completions, so no setting matters."""
    hashed: dict[str, Any] = keyed(settings.section)
    if settings.section.ties == "randomized":
        hashed["seed"] = settings.seed
    family = make_family("quantiles", VERSION, hashed, {})
    held_out = make_family("quantiles", VERSION, {}, {})
    rewards = upstream["rewards"]
    rewards_of = rewards.by_prompts()
    parts = []
    for prompts in upstream.prompt_parts():
        split = prompts.slice["split"]
        inputs = [part.key for part in rewards_of[prompts.key.fingerprint]]
        of = family if split == "train" else held_out
        key = part_key("quantiles", of, [key.fingerprint for key in inputs])
        common = {"prompts": prompts.key.fingerprint, "split": split}
        parts.append(PartPlan(key, (prompts.key, *inputs), common))
    families = {"train": family, "eval": held_out}
    rows = {split: fingerprint([of, rewards.rows[split]]) for split, of in families.items()}
    parents = upstream.parents("rewards")
    return StagePlan("quantiles", family, hashed, {}, tuple(parts), parents, rows)


def compute(work: Work[Settings]) -> Iterator[PartRecord]:
    """Compute the group, two parts at a time; light enough to run where it is called."""
    with ThreadPoolExecutor(_THREADS) as threads:  # Parquet and NumPy leave the interpreter to the other part
        yield from threads.map(lambda part: _compute_part(work, part), work.parts)


def _compute_part(work: Work[Settings], part: PartPlan) -> PartRecord:
    started = time.monotonic()
    prompts = work.store.read_part(work.input(part, "prompts"), columns=["prompt_id"])["prompt_id"]
    rewards = pa.concat_tables(
        work.store.read_part(record, columns=_COLUMNS, encoded=_TEXTS)
        for record in work.inputs(part, "rewards")
    )
    table, rejects = quantile_table(
        prompts.combine_chunks(), rewards, work.settings.section, part.slice["split"], work.settings.seed
    )
    equal = int(_all_equal(table["ref_rewards"].combine_chunks()).sum())
    counts = {"equal_rewards": equal, "num_excluded": pc.sum(table["num_excluded"]).as_py() or 0}
    return work.commit(part, table, table=TABLE, started=started, rejects=rejects, metadata=counts)


def describe(settings: Settings, store: Store, plan: StagePlan) -> dict[str, Any]:
    """How many prompts have reference rewards that are all equal, as numbers and in words."""
    records = [plan.records[part.key.fingerprint] for part in plan.parts]
    counts = {
        name: sum(record.metadata[name] for record in records) for name in ("equal_rewards", "num_excluded")
    }
    if not counts["equal_rewards"]:
        return counts
    section = settings.section
    effect = (
        f"{counts['num_excluded']:,} training completions with the same reward are excluded"
        if section.equal_rewards == "exclude"
        else f"a training completion with the same reward keeps the quantile that `ties: {section.ties}` gives"
    )
    prompts = f"{counts['equal_rewards']:,} of {sum(record.rows for record in records):,} prompts"
    return counts | {"note": f"the reference rewards of {prompts} are all equal; {effect}"}


_THREADS = 2
_TEXTS = ["prompt_id", "origin"]
_COLUMNS = [*_TEXTS, "sample_index", "reward"]
_ORIGINS = ["offline", "reference", "policy"]


@cache
def _origins() -> pa.Array:
    return pa.array(_ORIGINS)  # not at import: pyarrow loads pandas for it


def quantile_table(
    prompt_ids: pa.Array, rewards: pa.Table, config: QuantilesConfig, split: str, seed: int
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The quantiles rows of one part, and the prompts rejected because too few of their reference
    samples have a reward.

    `rewards` has `prompt_id`, `origin`, `sample_index` and `reward`, in any order; null rewards and
    other prompts are passed over.
    """
    prompt_B = _positions(rewards["prompt_id"], prompt_ids)
    origin_B = _positions(rewards["origin"], _origins())
    reward_B = rewards["reward"].to_numpy().astype(np.float64)  # an earlier version stored float32
    scored_B = (prompt_B >= 0) & ~np.isnan(reward_B)
    sampled_B = scored_B & (origin_B == 1)

    index_B = rewards["sample_index"].to_numpy()
    sampled_only = config.train_on in ("reference", "both") and split == "train"
    if config.num_ref is not None and split == "train":
        first = (config.num_completions or 0) if sampled_only else 0
        sampled_B &= (index_B >= first) & (index_B < first + config.num_ref)
        sampled_only = False
    needed = 2 if config.self_exclusion and sampled_only else 1
    num_ref_P = np.bincount(prompt_B[sampled_B], minlength=len(prompt_ids))
    usable_P = num_ref_P >= needed
    rejects = [
        {
            "key": prompt_ids[p].as_py(),
            "reason": f"{num_ref_P[p]} of its reference completions have a reward, {needed} needed",
            "prompt_id": prompt_ids[p].as_py(),
        }
        for p in np.flatnonzero(~usable_P)
    ]
    scored_B &= usable_P[prompt_B]
    references_B = scored_B & sampled_B
    ref_prompt, ref_rewards = _sorted_within(prompt_B[references_B], reward_B[references_B], len(prompt_ids))
    trained_B = scored_B & _trained_on(origin_B, index_B, config, split)
    excluded_B = np.zeros_like(trained_B)
    if config.equal_rewards == "exclude":
        lowest_P, highest_P = np.full((2, len(prompt_ids)), np.nan)
        ends = np.cumsum(np.bincount(ref_prompt, minlength=len(prompt_ids)))
        lowest_P[usable_P] = ref_rewards[np.append(0, ends[:-1])[usable_P]]
        highest_P[usable_P] = ref_rewards[ends[usable_P] - 1]
        excluded_B = trained_B & (reward_B == lowest_P[prompt_B]) & (reward_B == highest_P[prompt_B])
    num_excluded_P = np.bincount(prompt_B[excluded_B], minlength=len(prompt_ids))
    rows = np.flatnonzero(trained_B & ~excluded_B)
    rows = rows[np.lexsort((index_B[rows], origin_B[rows], prompt_B[rows]))]
    training = {
        "prompt": prompt_B[rows],
        "origin": origin_B[rows],
        "sample_index": index_B[rows],
        "reward": reward_B[rows],
    }
    return _table(
        prompt_ids, ref_prompt, ref_rewards, training, num_excluded_P, usable_P, config, seed
    ), rejects


def _trained_on(origin_B: Ints, index_B: Ints, config: QuantilesConfig, split: str) -> npt.NDArray[np.bool_]:
    if split != "train":
        return np.zeros(len(origin_B), dtype=bool)
    few = np.iinfo(np.int64).max if config.num_completions is None else config.num_completions
    of: dict[str, npt.NDArray[np.bool_]] = {
        "offline": origin_B == 0,
        "reference": (origin_B == 1) & (index_B < few),
        "policy": origin_B == 2,
    }
    of["both"] = of["reference"] | of["offline"]
    return of[config.train_on]


def _table(
    prompt_ids: pa.Array,
    ref_prompt: Ints,
    ref_rewards: Floats,
    training: dict[str, npt.NDArray[Any]],
    num_excluded_P: Ints,
    usable_P: npt.NDArray[np.bool_],
    config: QuantilesConfig,
    seed: int,
) -> pa.Table:
    ref_offsets, offsets = (
        _offsets(ref_prompt, len(prompt_ids)),
        _offsets(training["prompt"], len(prompt_ids)),
    )
    num_ref_P = np.diff(ref_offsets)
    sampled = (training["origin"] == 1) & (config.num_ref is None)  # itself among its references
    quantiles = quantile_rewards(
        training["reward"],
        ref_rewards,
        offsets=offsets,
        ref_offsets=ref_offsets,
        ties=config.ties,
        in_reference=sampled if sampled.any() else None,
        self_exclusion=config.self_exclusion,
        seed=seed,
    )
    compared = np.repeat(num_ref_P, np.diff(offsets)) - (sampled & config.self_exclusion)
    low, high = quantile_bounds(quantiles, compared, confidence=config.confidence)
    num_ref = num_ref_P[usable_P]
    starts = ref_offsets[:-1][usable_P]
    mean = np.add.reduceat(ref_rewards, starts) / num_ref if len(starts) else np.empty(0)
    deviation = (ref_rewards - np.repeat(mean, num_ref)) ** 2
    variance = np.add.reduceat(deviation, starts) / np.maximum(num_ref - 1, 1) if len(starts) else np.empty(0)
    kept = np.append(usable_P, True)
    columns = {
        "prompt_id": prompt_ids.filter(pa.array(usable_P)),
        "ref_rewards": _lists(ref_offsets[kept], ref_rewards),
        "num_ref": num_ref,
        "ref_mean": mean,
        "ref_std": pa.array(np.sqrt(variance), mask=num_ref < 2),  # of a sample, as the published code has it
        "num_excluded": num_excluded_P[usable_P],
        "sample_index": _lists(offsets[kept], training["sample_index"]),
        "origin": _lists(offsets[kept], _origins().take(pa.array(training["origin"]))),
        "reward": _lists(offsets[kept], training["reward"]),
        "quantile_reward": _lists(offsets[kept], quantiles),
        "quantile_low": _lists(offsets[kept], low),
        "quantile_high": _lists(offsets[kept], high),
    }
    schema = TABLE.schema
    return pa.Table.from_arrays([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema)


def _all_equal(lists: pa.ListArray) -> npt.NDArray[np.bool_]:
    """For every list of ascending values, none empty, whether they are all equal."""
    values, ends = lists.flatten().to_numpy(), np.cumsum(pc.list_value_length(lists).to_numpy())
    return (
        np.asarray(values[np.append(0, ends[:-1]).astype(np.int64)] == values[ends - 1])
        if len(ends)
        else ends > 0
    )


def _positions(column: pa.ChunkedArray, values: pa.Array) -> Ints:
    """Where each item of a string column stands in `values`; -1 where it is not among them."""
    chunks = column.dictionary_encode().chunks
    found = [pc.fill_null(pc.index_in(chunk.dictionary, value_set=values), -1).to_numpy() for chunk in chunks]
    places = [place[chunk.indices.to_numpy()] for place, chunk in zip(found, chunks, strict=True)]
    return np.concatenate(places).astype(np.int64) if places else np.empty(0, dtype=np.int64)


def _sorted_within(prompt: Ints, reward: Floats, prompts: int) -> tuple[Ints, Floats]:
    """Rewards ascending within their prompts, prompts ascending: prompts of one count are sorted as
    rows of a matrix."""
    order = np.argsort(prompt.astype(np.min_scalar_type(prompts)), kind="stable")
    prompt, reward = prompt[order], reward[order] + 0.0  # -0.0 becomes 0.0
    count_P = np.bincount(prompt, minlength=prompts)
    start_P = np.cumsum(count_P) - count_P
    for count in np.unique(count_P):
        places = start_P[count_P == count, None] + np.arange(count)
        reward[places] = np.sort(reward[places], axis=1)
    return prompt, reward


def _offsets(prompt: Ints, prompts: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(prompt, minlength=prompts))]).astype(np.int64)


def _lists(offsets: Ints, values: Any) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


STAGE = Stage(
    name="quantiles",
    version=VERSION,
    summary="Turn the rewards of training completions into their quantiles among the reference rewards of the same prompt.",
    unit="prompts",
    parents=("rewards",),
    settings=Settings,
    section=QuantilesConfig,
    table=TABLE,
    plan=plan,
    compute=compute,
    uses_gpu=False,
    describe=describe,
    chart="tasks.charts:training_quantiles",
)
