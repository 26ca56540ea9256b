"""`qrpo compare`: methods and settings, trained on the same samples and evaluated on the same prompts."""

import logging
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from prefect import flow
from rich.table import Table

import storage
from flows.stages import DEFAULT_STORE
from qrpo.errors import ConfigError, DataError
from qrpo.evaluation.comparison import Contender, compare_methods, selection_half
from qrpo.evaluation.statistics import Floats
from qrpo.evaluation.summary import COLUMNS, Score, json_numbers, prompt_scores
from storage import Store
from tasks.comparison import Candidate, candidates
from tasks.config import PipelineConfig
from tasks.planner import Planner
from tasks.retries import NO_RESULT
from tasks.run_stage import run_stage
from tasks.stages import STAGES

__all__ = ["compare", "comparison_table"]

log = logging.getLogger("qrpo")
SCORES: tuple[Score, ...] = ("reward", "win_rate", "quantile_reward", "kl", "length")
_REFERENCE_SCORES: tuple[Score, ...] = (
    "reward",
    "quantile_reward",
    "length",
)  # others compare with the reference


@flow(name="compare", flow_run_name="{config.name}: compare methods", **NO_RESULT)
def compare(config: PipelineConfig, store: str = DEFAULT_STORE) -> dict[str, Any]:
    """Train every method over its grid and seeds, evaluate each policy, and report the best of each method.

    All candidates share the stages up to the rewards. A policy that the store already has is not trained again. Every candidate
    is a named run. Raises ConfigError if `compare.methods` is empty.

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
        for stage in STAGES:
            run_stage(stage, candidate.config, store, planner=planner)
    return judge(config, Store(store), every)


def judge(config: PipelineConfig, store: Store, every: Sequence[Candidate]) -> dict[str, Any]:
    """The report of `qrpo.evaluation.comparison.compare_methods` on finished candidates, with the scores of the reference."""
    tables = {
        candidate.config.name: storage.open(store, candidate.config.name, "evaluation").dataset.to_table(
            list(COLUMNS)
        )
        for candidate in every
    }
    by_prompt = {name: _by_prompt(table) for name, table in tables.items()}
    shared = sorted(set.intersection(*(set(scores["reward"]) for scores in by_prompt.values())))
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
            name: np.array([[by_prompt[one.config.name][name][p] for p in shared] for one in of_seeds])
            for name in SCORES
        }
        contenders.setdefault(method, []).append(Contender(of_seeds[0].settings, scores))
    report = compare_methods(contenders, shared, select_by=config.compare.select_by, seed=config.seed)
    table = next(iter(tables.values()))
    reports = {
        prompt
        for prompt, chosen in zip(shared, selection_half(shared, config.seed), strict=True)
        if not chosen
    }
    reference = {name: _reference_mean(table, name, reports) for name in _REFERENCE_SCORES}
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


def comparison_table(report: dict[str, Any]) -> Table:
    """The report as a table with one row per method."""
    select_by = report["select_by"].replace("_", " ")
    title = (
        f"{report['run']}: each method's best by {select_by} on half of the held-out prompts, reported on the other "
        f"{report['prompts']}; {report['seeds']} seeds, 95% intervals"
    )
    table = Table(
        "method", *(name.replace("_", " ") for name in SCORES), "behind the first", "settings", title=title
    )
    reference = report["reference"]
    own = [f"{reference[name]:.3f}" if name in reference else "" for name in SCORES]
    table.add_row("reference", *own, "", "")
    for method, entry in report["methods"].items():
        cells = [_interval(entry["scores"][name]) for name in SCORES]
        behind = _interval(entry["behind"]) if "behind" in entry else ""
        settings = ", ".join(
            f"{key.removeprefix('policy.')} {value}"
            for key, value in entry["settings"].items()
            if key != "policy.loss"
        )
        table.add_row(method, *cells, behind, settings)
    return table


def _interval(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def _reference_mean(table: Any, score: Score, prompts: Container[str]) -> float:
    """The reference's mean score over these prompts."""
    prompt_ids, of_model = prompt_scores(table, score)
    return float(
        np.mean(
            [value for one, value in zip(prompt_ids, of_model["reference"], strict=True) if one in prompts]
        )
    )


def _by_prompt(table: Any) -> dict[str, dict[str, float]]:
    """The policy's scores by name and prompt."""
    scores: dict[str, dict[str, float]] = {}
    for name in SCORES:
        prompt_ids, of_model = prompt_scores(table, name)
        scores[name] = dict(zip(prompt_ids, of_model["policy"].tolist(), strict=True))
    return scores
