"""The `completions` stage: sample every prompt `num_ref` times from the reference policy, and
encode the dataset's own completions.

Samples of a prompt are cut into blocks, one block of one prompts part being one part here. A sample
depends on its own seed alone (a hash of run seed, prompt and sample index), so raising `num_ref`
adds blocks and lowering it leaves some unused. Parts are committed while the engine goes on with
the next.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from qrpo.config import Section, execution_option, keyed
from qrpo.data.chat import encode_completion, encode_prompt, load_tokenizer
from qrpo.engines import EngineConfig
from qrpo.engines.sampling import Engine, Sample, SampleRequest, SamplingConfig, sample_seed
from qrpo.errors import DataError
from qrpo.models import ModelConfig, dtype_setting
from qrpo.models.limits import model_limits
from storage import Manifest, PartKey, PartRecord, Store, fingerprint
from storage.checks import at_least, finite, one_of
from storage.table import Table, column
from tasks.engines import engine_for
from tasks.plan import PartPlan, StagePlan, Upstream, make_family, part_key
from tasks.reuse import reusable_rows
from tasks.stage import RowReuse, Stage, setting
from tasks.stages.prompts import content, prompt_rows
from tasks.stages.quantiles import TrainOn
from tasks.stages.reference import model_for
from tasks.work import Work

if TYPE_CHECKING:
    import polars as pl

VERSION = 1

ORIGINS = ("reference", "offline", "policy")
"""Where a completion of this table comes from."""

TABLE = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column("sample_index", pa.int32()),
            column("origin", pa.string()),
            column("text", pa.string()),
            column("token_ids", pa.list_(pa.int32())),
            column("finish_reason", pa.string(), null=True),
            column("sampled_logprob", pa.float32(), null=True),
            column("prompt_token_ids", pa.list_(pa.int32()), null=True),  # what it was sampled from
        ]
    ),
    key=("prompt_id", "origin", "sample_index"),
    checks=(
        one_of("origin", ORIGINS),
        at_least("sample_index", 0),
        at_least("token_ids", 0),
        finite("sampled_logprob"),
    ),
)


class CompletionsConfig(Section):
    """Sampling from the reference policy."""

    num_ref: int = Field(10, ge=1, json_schema_extra={"fingerprint": False})
    """Reference completions per prompt. Raising it samples only the new ones."""
    samples_per_part: int = execution_option(16, ge=1)
    """Samples of each prompt that one part holds."""
    engine: EngineConfig = EngineConfig()
    """What generates: vLLM or transformers."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature, length limit and the like."""


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    section: CompletionsConfig = setting("completions")
    seed: int = setting("seed")
    model: ModelConfig = setting("reference.model")
    train_on: TrainOn = setting("quantiles.train_on")
    policy_samples: int = setting("rounds.num_completions")
    from_run: str | None = setting("rounds.from_run")


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """Blocks of samples for every prompts part, and one offline part where the dataset's
    completions are trained on.

    In a later round, also blocks of the policy's own samples for the prompts that are trained on.
    """
    section = settings.section
    hashed = {
        "engine": engine_settings(section.engine, settings.model),
        "sampling": keyed(section.sampling),
        "seed": settings.seed,
    }
    outside = {"model": upstream.reference_identity}
    family = make_family("completions", VERSION, hashed, outside)
    offline_family = make_family("completions", VERSION, {"origin": "offline"}, outside)
    before = upstream.previous_policy
    from_policy = {"model": {"artifact": before.fingerprint}} if before else {}
    policy_family = make_family("completions", VERSION, hashed, from_policy)
    trains_offline = settings.train_on in ("offline", "both")
    parts: list[PartPlan] = []
    for prompts in upstream.prompt_parts():
        split = prompts.slice["split"]
        common = {"prompts": prompts.key.fingerprint, "split": split}
        inputs = (prompts.key, *upstream.reference_inputs)
        if trains_offline and split == "train":
            key = part_key("completions", offline_family, prompts.slice["offline"])
            parts.append(PartPlan(key, inputs, {**common, "origin": "offline"}))
        blocks = [("reference", family, inputs, section.num_ref)]
        if before is not None and split == "train":
            blocks.append(("policy", policy_family, (prompts.key, before.key), settings.policy_samples))
        first: tuple[PartKey, ...] = ()
        for origin, of, sources, samples in blocks:
            for start in range(0, samples, section.samples_per_part):
                stop = min(start + section.samples_per_part, samples)
                key = part_key("completions", of, prompts.slice["ids"], start, stop)
                span = {**common, "origin": origin, "start": start, "stop": stop}
                parts.append(PartPlan(key, (*sources, *first), span))
                first = first or (key,)  # what all samples of a prompt are drawn from
    sampled = [family, section.num_ref]
    rows = {
        "train": fingerprint(
            [
                *sampled,
                content(upstream, "train", "id_sum"),
                [offline_family, content(upstream, "train", "offline_sum")] if trains_offline else None,
                [policy_family, settings.policy_samples] if before else None,
            ]
        ),
        "eval": fingerprint([*sampled, content(upstream, "eval", "id_sum")]),
    }
    parents = upstream.parents("prompts", "reference")
    return StagePlan("completions", family, hashed, outside, tuple(parts), parents, rows)


def engine_settings(engine: EngineConfig, model: ModelConfig) -> dict[str, Any]:
    """The engine's settings for fingerprints, with the dtype that it really samples in."""
    dtype: str = engine.dtype
    if dtype == "auto":
        dtype = dtype_setting(model, unstated_is_saved=engine.kind == "transformers")
    return {**keyed(engine), "dtype": dtype}


def samples_of(part: PartPlan, prompts: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """The rows of a completions or rewards part: (prompt_id, origin, sample_index)."""
    origin = part.slice["origin"]
    span = range(part.slice["start"], part.slice["stop"]) if origin != "offline" else None
    return [
        (prompt_id, origin, index)
        for prompt_id, offline in prompts.items()
        for index in (range(offline) if span is None else span)
    ]


def prompt_tokens(store: Store, records: Iterable[PartRecord]) -> dict[str, list[int]]:
    """The token ids that the samples of these parts were drawn from, by prompt.

    A template may render another prompt on another day (the date), so what was sampled from is kept
    and not rendered again. Parts of earlier versions do not have it.
    """
    tokens: dict[str, list[int]] = {}
    for record in records:
        rows = store.scan([record])
        if "prompt_token_ids" in rows.collect_schema():
            tokens = _tokens_by_prompt(rows) | tokens
    return tokens


def _tokens_by_prompt(rows: "pl.LazyFrame") -> dict[str, list[int]]:
    known = rows.select("prompt_id", "prompt_token_ids").drop_nulls()
    return dict(known.unique("prompt_id", keep="first", maintain_order=True).collect().iter_rows())


def compute(work: Work[Settings]) -> Iterator[PartRecord]:
    """Compute the group's parts, yielding each as soon as it is committed."""
    offline = [part for part in work.parts if part.slice["origin"] == "offline"]
    for part in offline:
        yield _encode_offline(work, part)
    for origin in ("reference", "policy"):
        sampled = [part for part in work.parts if part.slice["origin"] == origin]
        if sampled:
            yield from _sample(work.only(sampled), origin)


def _encode_offline(work: Work[Settings], part: PartPlan) -> PartRecord:
    started = time.monotonic()
    model = model_for(work, part, work.settings.model)
    tokenizer, limits = load_tokenizer(model), model_limits(model)
    rows: list[dict[str, Any]] = []
    rejects = []
    for prompt in prompt_rows(work, part, "messages", "offline_completions").values():
        for index, text in enumerate(prompt["offline_completions"]):
            try:
                token_ids = encode_completion(tokenizer, prompt["messages"], text, prompt["tools"])
                if unknown := limits.unknown_token(token_ids):
                    raise DataError(unknown)
            except DataError as error:
                key = f"{prompt['prompt_id']}/offline/{index}"
                rejects.append({"key": key, "reason": error, "prompt_id": prompt["prompt_id"]})
                continue
            row = {"prompt_id": prompt["prompt_id"], "sample_index": index, "origin": "offline"}
            rows.append({**row, "text": text, "token_ids": token_ids, "finish_reason": "dataset"})
    return work.commit(part, _table(rows), table=TABLE, started=started, rejects=rejects)


class _PartInProgress:
    """A part that is being sampled: its rows so far, and the prompts that it still waits for."""

    def __init__(self, work: Work[Settings], part: PartPlan) -> None:
        self.part = part
        self.span = range(part.slice["start"], part.slice["stop"])
        self.prompts = prompt_rows(work, part, "messages")
        reusable = reusable_rows(work, part, on=["prompt_id", "sample_index"])
        siblings = [key for key in part.inputs if key.stage == "completions"]
        self.tokens = prompt_tokens(work.store, work.store.find_parts(siblings).values())
        if "prompt_token_ids" in reusable.columns:
            self.tokens |= _tokens_by_prompt(reusable.lazy())
            reusable = reusable.drop("prompt_token_ids")
        self.rows = [
            row
            for row in reusable.to_dicts()
            if row["prompt_id"] in self.prompts and row["sample_index"] in self.span
        ]
        self.reused = len(self.rows)
        self.rejects: list[dict[str, Any]] = []
        there = {(row["prompt_id"], row["sample_index"]) for row in self.rows}
        lacking = {p: [index for index in self.span if (p, index) not in there] for p in self.prompts}
        self.waiting = {prompt_id: indices for prompt_id, indices in lacking.items() if indices}


def _sample(work: Work[Settings], origin: str) -> Iterator[PartRecord]:
    """Sample all parts of the group in one stream, prompt by prompt, and commit each part when its
    last prompt is done.

    `origin` is the stage whose model is asked: `reference`, or `policy` for that of the round
    before.
    """
    started = time.monotonic()
    model = model_for(work, work.parts[0], work.settings.model, stage=origin)
    engine = engine_for(work.settings.section.engine, model, work.log)
    waiting: dict[str, list[_PartInProgress]] = {}
    parts = [_PartInProgress(work, part) for part in work.parts]
    tokens = {prompt_id: ids for part in reversed(parts) for prompt_id, ids in part.tokens.items()}
    for part in parts:
        for prompt_id in part.waiting:
            waiting.setdefault(prompt_id, []).append(part)
        if not part.waiting:
            yield _commit(work, part, started)
    prompts = [parts[0].prompts[prompt_id] for prompt_id, parts in waiting.items()]
    wanted = {p: [index for part in parts for index in part.waiting[p]] for p, parts in waiting.items()}
    sampling, seed = work.settings.section.sampling, work.settings.seed
    requests, refused = sample_requests(engine, model, prompts, wanted, sampling, seed, origin, tokens)
    tokens |= {request.key: list(request.prompt_token_ids) for request in requests}
    for part in parts:
        part.tokens = tokens
    for prompt_id, reason in refused.items():
        for part in waiting[prompt_id]:
            part.rejects.append({"key": prompt_id, "reason": reason, "prompt_id": prompt_id})
        yield from _done_with(work, prompt_id, waiting, started)
    for prompt_id, samples in engine.sample(requests, sampling):
        for part in waiting[prompt_id]:
            part.rows += [
                sample_row(prompt_id, sample, origin) for sample in samples if sample.index in part.span
            ]
        yield from _done_with(work, prompt_id, waiting, started)
    assert not waiting, f"the engine returned nothing for {len(waiting)} prompts"


def _done_with(
    work: Work[Settings], prompt_id: str, waiting: dict[str, list[_PartInProgress]], started: float
) -> Iterator[PartRecord]:
    """No part waits for this prompt any longer; those that wait for nothing else are committed."""
    for part in waiting.pop(prompt_id):
        del part.waiting[prompt_id]
        if not part.waiting:
            yield _commit(work, part, started)


def _commit(work: Work[Settings], part: _PartInProgress, started: float) -> PartRecord:
    counts = {"computed": len(part.rows) - part.reused, "reused": part.reused, "cut": count_cut(part.rows)}
    rows = _table(part.rows, part.tokens)
    return work.commit(part.part, rows, table=TABLE, started=started, rejects=part.rejects, metadata=counts)


def sample_requests(
    engine: Engine,
    model: ModelConfig,
    prompts: Sequence[Mapping[str, Any]],
    wanted: Mapping[str, Sequence[int]],
    sampling: SamplingConfig,
    seed: int,
    namespace: str,
    tokens: Mapping[str, Sequence[int]],
) -> tuple[list[SampleRequest], dict[str, str]]:
    """Requests for the wanted sample indices of each prompt, and the prompts that cannot be asked
    with the reason.

    `tokens` has the token ids of prompts that were sampled from before; only the others are
    rendered.
    """
    tokenizer, limits = load_tokenizer(model), model_limits(model, engine.max_model_len)
    requests, refused = [], {}
    for prompt in prompts:
        prompt_id = prompt["prompt_id"]
        try:
            token_ids = tokens.get(prompt_id) or encode_prompt(tokenizer, prompt["messages"], prompt["tools"])
        except DataError as error:
            refused[prompt_id] = str(error)
            continue
        problem = limits.problem(token_ids, sampling.max_tokens)
        if problem:
            refused[prompt_id] = problem
            continue
        seeds = tuple((index, sample_seed(seed, prompt_id, index, namespace)) for index in wanted[prompt_id])
        requests.append(SampleRequest(prompt_id, token_ids, seeds))
    return requests, refused


def sample_row(prompt_id: str, sample: Sample, origin: str) -> dict[str, Any]:
    """One row of the completions table."""
    return {
        "prompt_id": prompt_id,
        "sample_index": sample.index,
        "origin": origin,
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "sampled_logprob": sample.sampled_logprob,
    }


def _table(
    rows: list[dict[str, Any]], tokens: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> pa.Table:
    rows.sort(key=lambda row: (row["prompt_id"], row["sample_index"]))
    table = pa.Table.from_pylist(rows, schema=TABLE.schema)
    place = {prompt_id: number for number, prompt_id in enumerate(tokens)}
    places = pa.array([place.get(row["prompt_id"]) for row in rows], pa.int32())
    sampled_from = pa.array(list(tokens.values()), pa.list_(pa.int32())).take(places)
    return table.set_column(table.num_columns - 1, TABLE.schema.field("prompt_token_ids"), sampled_from)


def _lost_rows(manifest: Manifest, store: Store) -> tuple[int, int]:
    """A prompt that cannot be asked loses every sample of its part."""
    blocks = [record.metadata.get("stop", 1) - record.metadata.get("start", 0) for record in manifest.parts]
    lost = sum(record.rejects * block for record, block in zip(manifest.parts, blocks, strict=True))
    return lost, manifest.rows + lost


def count_cut(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many completions ended by their length limit."""
    return sum(row["finish_reason"] == "length" for row in rows)


def remark_on_cut(manifest: Manifest) -> str | None:
    """What to say if most completions ended by their length limit, as far as the parts counted
    them."""
    counted = [part for part in manifest.parts if "cut" in part.metadata]
    cut, rows = sum(part.metadata["cut"] for part in counted), sum(part.rows for part in counted)
    if cut <= rows / 2:
        return None
    return (
        f"{cut} of {rows} samples were cut at max_tokens. If they run on past the end of the answer, name the token that "
        "ends it in completions.sampling.stop_token_ids; if not, raise completions.sampling.max_tokens"
    )


STAGE = Stage(
    name="completions",
    version=VERSION,
    summary="Sample y_1 .. y_n from the reference policy for every prompt.",
    unit="completions",
    parents=("prompts", "reference"),
    settings=Settings,
    section=CompletionsConfig,
    table=TABLE,
    plan=plan,
    compute=compute,
    gpus=lambda settings: settings.section.engine.gpus,
    reuse=RowReuse(
        "completions to sample",
        lambda settings, part, prompts: (
            samples_of(part, prompts) if part.slice["origin"] != "offline" else []  # these are only encoded
        ),
        ("prompt_id", "origin", "sample_index"),
    ),
    lost_rows=_lost_rows,
    remark=remark_on_cut,
    chart="tasks.charts:completion_lengths",
)
