"""The `completions` stage: sample every prompt `num_ref` times from the reference policy, and encode the dataset's own completions.

Samples of a prompt are cut into blocks, one block of one prompts part being one part here. A sample depends on its own seed
alone (a hash of run seed, prompt and sample index), so raising `num_ref` adds blocks and lowering it leaves some unused. Parts are
committed while the engine goes on with the next.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from qrpo.config import Section, execution_option, keyed
from qrpo.data.chat import encode_completion, encode_prompt, load_tokenizer
from qrpo.engines import EngineConfig
from qrpo.engines.sampling import Engine, Sample, SampleRequest, SamplingConfig, length_problem, sample_seed
from qrpo.errors import DataError
from qrpo.models import ModelConfig
from storage import PartKey, PartRecord, Store, fingerprint
from storage.tables import SCHEMAS
from tasks.engines import engine_for
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.reuse import reusable_rows
from tasks.rounds import previous_policy
from tasks.stages.prompts import prompt_parts, prompt_rows
from tasks.stages.reference import model_for, reference_identity, reference_inputs, reference_parent
from tasks.work import Work

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["CompletionsConfig", "compute", "parts_by_prompts", "plan", "sample_requests", "sample_row"]

VERSION = 1


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


def plan(config: "PipelineConfig", plans: Mapping[str, StagePlan], store: Store) -> StagePlan:
    """Blocks of samples for every prompts part, and one offline part where the dataset's completions are trained on.

    In a later round, also blocks of the policy's own samples for the prompts that are trained on.
    """
    section = config.completions
    settings = {"engine": keyed(section.engine), "sampling": keyed(section.sampling), "seed": config.seed}
    outside = {"model": reference_identity(config, plans)}
    family = make_family("completions", VERSION, settings, outside)
    offline_family = make_family("completions", VERSION, {"origin": "offline"}, outside)
    before = previous_policy(config, store)
    from_policy = {"model": {"artifact": before.fingerprint}} if before else {}
    policy_family = make_family("completions", VERSION, settings, from_policy)
    from_model = reference_inputs(plans)
    parts: list[PartPlan] = []
    for prompts in prompt_parts(plans):
        common = {"prompts": prompts.key.fingerprint, "split": prompts.slice["split"]}
        inputs = (prompts.key, *from_model)
        if config.quantiles.train_on in ("offline", "both") and prompts.slice["split"] == "train":
            key = PartKey(
                "completions", offline_family, fingerprint([offline_family, prompts.slice["offline"]])
            )
            parts.append(PartPlan(key, inputs, {**common, "origin": "offline"}))
        blocks = [("reference", family, inputs, section.num_ref)]
        if before is not None and prompts.slice["split"] == "train":
            sampled = config.rounds.num_completions
            blocks.append(("policy", policy_family, (prompts.key, before.key), sampled))
        for origin, of, sources, samples in blocks:
            for start in range(0, samples, section.samples_per_part):
                stop = min(start + section.samples_per_part, samples)
                key = PartKey("completions", of, fingerprint([of, prompts.slice["ids"], start, stop]))
                parts.append(
                    PartPlan(key, sources, {**common, "origin": origin, "start": start, "stop": stop})
                )
    parents = {"prompts": plans["prompts"].fingerprint, **reference_parent(plans)}
    return StagePlan("completions", family, settings, outside, tuple(parts), parents)


def parts_by_prompts(plan: StagePlan) -> dict[str, list[PartPlan]]:
    """The parts of a completions or rewards plan by the fingerprint of the prompts part that they belong to."""
    parts: dict[str, list[PartPlan]] = {}
    for part in plan.parts:
        parts.setdefault(part.slice["prompts"], []).append(part)
    return parts


def compute(work: Work) -> Iterator[PartRecord]:
    """Compute the group's parts, yielding each as soon as it is committed."""
    offline = [part for part in work.parts if part.slice["origin"] == "offline"]
    for part in offline:
        yield _encode_offline(work, part)
    for origin in ("reference", "policy"):
        sampled = [part for part in work.parts if part.slice["origin"] == origin]
        if sampled:
            yield from _sample(work.only(sampled), origin)


def _encode_offline(work: Work, part: PartPlan) -> PartRecord:
    started = time.monotonic()
    tokenizer = load_tokenizer(model_for(work, part))
    rows: list[dict[str, Any]] = []
    rejects = []
    for prompt in prompt_rows(work, part, "messages", "offline_completions").values():
        for index, text in enumerate(prompt["offline_completions"]):
            try:
                token_ids = encode_completion(tokenizer, prompt["messages"], text)
            except DataError as error:
                key = f"{prompt['prompt_id']}/offline/{index}"
                rejects.append({"key": key, "reason": error, "prompt_id": prompt["prompt_id"]})
                continue
            rows.append(_row(prompt["prompt_id"], index, "offline", text, token_ids, "dataset", None))
    return work.commit(part, _table(rows), started=started, rejects=rejects)


class _Filling:
    """A part that is being sampled: its rows so far, and the prompts that it still waits for."""

    def __init__(self, work: Work, part: PartPlan) -> None:
        self.part = part
        self.span = range(part.slice["start"], part.slice["stop"])
        self.prompts = prompt_rows(work, part, "messages")
        reusable = reusable_rows(work, part, on=["prompt_id", "sample_index"]).to_dicts()
        self.rows = [r for r in reusable if r["prompt_id"] in self.prompts and r["sample_index"] in self.span]
        self.rejects: list[dict[str, Any]] = []
        there = {(row["prompt_id"], row["sample_index"]) for row in self.rows}
        lacking = {p: [index for index in self.span if (p, index) not in there] for p in self.prompts}
        self.waiting = {prompt_id: indices for prompt_id, indices in lacking.items() if indices}


def _sample(work: Work, origin: str) -> Iterator[PartRecord]:
    """Sample all parts of the group in one stream, prompt by prompt, and commit each part when its last prompt is done.

    `origin` is the stage whose model is asked: `reference`, or `policy` for that of the round before.
    """
    started = time.monotonic()
    model = model_for(work, work.parts[0], stage=origin)
    engine = engine_for(work.config.completions.engine, model, work.log)
    waiting: dict[str, list[_Filling]] = {}
    for filling in [_Filling(work, part) for part in work.parts]:
        for prompt_id in filling.waiting:
            waiting.setdefault(prompt_id, []).append(filling)
        if not filling.waiting:
            yield _commit(work, filling, started)
    prompts = [fillings[0].prompts[prompt_id] for prompt_id, fillings in waiting.items()]
    wanted = {
        p: [index for filling in fillings for index in filling.waiting[p]] for p, fillings in waiting.items()
    }
    requests, refused = sample_requests(engine, model, prompts, wanted, work.config, namespace=origin)
    for prompt_id, reason in refused.items():
        for filling in waiting[prompt_id]:
            filling.rejects.append({"key": prompt_id, "reason": reason, "prompt_id": prompt_id})
        yield from _done_with(work, prompt_id, waiting, started)
    for prompt_id, samples in engine.sample(requests, work.config.completions.sampling):
        for filling in waiting[prompt_id]:
            filling.rows += [
                sample_row(prompt_id, sample, origin) for sample in samples if sample.index in filling.span
            ]
        yield from _done_with(work, prompt_id, waiting, started)
    assert not waiting, f"the engine returned nothing for {len(waiting)} prompts"


def _done_with(
    work: Work, prompt_id: str, waiting: dict[str, list[_Filling]], started: float
) -> Iterator[PartRecord]:
    """No part waits for this prompt any longer; those that wait for nothing else are committed."""
    for filling in waiting.pop(prompt_id):
        del filling.waiting[prompt_id]
        if not filling.waiting:
            yield _commit(work, filling, started)


def _commit(work: Work, filling: _Filling, started: float) -> PartRecord:
    return work.commit(filling.part, _table(filling.rows), started=started, rejects=filling.rejects)


def sample_requests(
    engine: Engine,
    model: ModelConfig,
    prompts: Sequence[Mapping[str, Any]],
    wanted: Mapping[str, Sequence[int]],
    config: "PipelineConfig",
    namespace: str,
) -> tuple[list[SampleRequest], dict[str, str]]:
    """Requests for the wanted sample indices of each prompt, and the prompts that cannot be asked with the reason."""
    section = config.completions
    tokenizer = load_tokenizer(model)
    requests, refused = [], {}
    for prompt in prompts:
        prompt_id = prompt["prompt_id"]
        try:
            token_ids = encode_prompt(tokenizer, prompt["messages"])
        except DataError as error:
            refused[prompt_id] = str(error)
            continue
        problem = length_problem(token_ids, engine.max_model_len, section.sampling.max_tokens)
        if problem:
            refused[prompt_id] = problem
            continue
        seeds = tuple(
            (index, sample_seed(config.seed, prompt_id, index, namespace)) for index in wanted[prompt_id]
        )
        requests.append(SampleRequest(prompt_id, token_ids, seeds))
    return requests, refused


def sample_row(prompt_id: str, sample: Sample, origin: str) -> dict[str, Any]:
    """One row of the completions table."""
    logprob = sample.sampled_logprob
    return _row(prompt_id, sample.index, origin, sample.text, sample.token_ids, sample.finish_reason, logprob)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema=SCHEMAS["completions"])
    return table.sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")])


def _row(
    prompt_id: str,
    sample_index: int,
    origin: str,
    text: str,
    token_ids: Sequence[int],
    finish_reason: str,
    sampled_logprob: float | None,
) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "sample_index": sample_index,
        "origin": origin,
        "text": text,
        "token_ids": list(token_ids),
        "finish_reason": finish_reason,
        "sampled_logprob": sampled_logprob,
    }
