"""`qrpo compare`: methods and settings, trained on the same samples and evaluated on the same
prompts."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from prefect import flow

import storage
from flows.stages import DEFAULT_STORE
from flows.views.results import SCORES
from qrpo.errors import ConfigError, DataError
from qrpo.evaluation.comparison import Contender, compare_methods, selection_half
from qrpo.evaluation.statistics import Floats
from qrpo.evaluation.summary import COLUMNS, json_numbers, prompt_scores
from storage import Store
from tasks.comparison import Candidate, candidates
from tasks.config import PipelineConfig
from tasks.planner import Planner
from tasks.preflight import require_preflight
from tasks.retries import NO_RESULT
from tasks.run_stage import run_stage
from tasks.stages import STAGE_NAMES, STAGES

log = logging.getLogger("qrpo")


@flow(name="compare", flow_run_name="{config.name}: compare methods", **NO_RESULT)
def compare(config: PipelineConfig, store: str = DEFAULT_STORE) -> dict[str, Any]:
    """Train every method over its grid and seeds, evaluate each policy, and report the best of each
    method.

    All candidates share the stages up to the rewards. A policy that the store already has is not
    trained again. Every candidate is a named run. Raises ConfigError if `compare.methods` is empty.

    Args:
        config: The YAML file as a form; its section `compare` names the methods.
        store: Where artifacts are kept: a folder of the worker's machine, or a URL such as s3://bucket/qrpo.
    """
    if not config.compare.methods:
        raise ConfigError(
            "compare.methods is empty: add a method, such as `dpo: {policy.loss: dpo, policy.beta: [0.1, 0.3]}`"
        )
    every = list(candidates(config))
    planner = Planner(config, Store(store))
    for number, candidate in enumerate(every, start=1):
        log.info("%d of %d: %s", number, len(every), candidate.config.name)
        planner = planner.following(candidate.config)  # all on the prompts that the first one reads
        require_preflight(planner, STAGE_NAMES)
        for stage in STAGES:
            run_stage(stage, candidate.config, store, planner=planner)
    return judge(config, Store(store), every)


def judge(config: PipelineConfig, store: Store, every: Sequence[Candidate]) -> dict[str, Any]:
    """The report of `qrpo.evaluation.comparison.compare_methods` on finished candidates, with the
    scores of the reference."""
    tables = {
        candidate.config.name: storage.open(store, candidate.config.name, "evaluation").dataset.to_table(
            list(COLUMNS)
        )
        for candidate in every
    }
    by_prompt = {name: _scores_by_prompt(table) for name, table in tables.items()}
    shared = sorted(set.intersection(*(set(scores["reward"]["policy"]) for scores in by_prompt.values())))
    if len(shared) < 2:
        raise DataError(
            f"compare: {len(shared)} held-out prompts have samples of every policy, expected at least two; hold out more "
            "(prompts.eval_fraction), and check the rejects of the evaluations"
        )
    points: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in every:
        points.setdefault((candidate.method, repr(candidate.settings)), []).append(candidate)
    contenders: dict[str, list[Contender]] = {}
    for (method, _), of_seeds in points.items():
        scores: dict[str, Floats] = {
            name: np.array(
                [[by_prompt[one.config.name][name]["policy"][p] for p in shared] for one in of_seeds]
            )
            for name in SCORES
        }
        contenders.setdefault(method, []).append(Contender(of_seeds[0].settings, scores))
    report = compare_methods(contenders, shared, select_by=config.compare.select_by, seed=config.seed)
    chosen = selection_half(shared, config.seed)
    reports = [prompt for prompt, of_selection in zip(shared, chosen, strict=True) if not of_selection]
    first = by_prompt[every[0].config.name]
    reference = {
        name: float(np.mean([scores["reference"][prompt] for prompt in reports]))
        for name, scores in first.items()
        if "reference" in scores  # the others compare with it
    }
    plain: dict[str, Any] = json_numbers(
        {
            "run": config.name,
            "seeds": len(config.compare.seeds),
            **report,
            "reference": reference,
            "reference_prompts": len(reports),
        }
    )
    return plain


def _scores_by_prompt(table: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Score -> model -> prompt -> the mean score of the model's samples."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in SCORES:
        prompt_ids, of_model = prompt_scores(table, name)
        found[name] = {
            model: dict(zip(prompt_ids, values.tolist(), strict=True)) for model, values in of_model.items()
        }
    return found
