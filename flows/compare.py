"""`qrpo compare`: QRPO, DPO, REBEL, SimPO and whatever settings, trained from the same samples and judged on the same prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from prefect import flow, get_run_logger, tags
from rich.table import Table

import storage
from flows.stages import DEFAULT_STORE
from qrpo.errors import ConfigError, DataError
from qrpo.evaluation.comparison import Contender, compare_methods
from qrpo.evaluation.statistics import Floats
from qrpo.evaluation.summary import COLUMNS, Score, json_numbers, prompt_scores
from storage import Store
from tasks.comparison import Candidate, candidates
from tasks.config import PipelineConfig
from tasks.run_stage import run_stage
from tasks.stages import STAGES

__all__ = ["compare", "comparison_table"]

SCORES: tuple[Score, ...] = ("reward", "win_rate", "quantile_reward", "kl", "length")
_OWN: tuple[Score, ...] = ("reward", "quantile_reward", "length")  # what the reference has by itself


@flow(name="compare", flow_run_name="{config.name}: compare methods")
def compare(config: PipelineConfig, store: str = DEFAULT_STORE) -> dict[str, Any]:
    """Train every method over its grid and seeds, evaluate each policy, and report each method's best.

    The stages up to the rewards are the same for all, so they are computed once; a policy that the store has is not trained again.
    Every candidate is a run of its own, to be looked at like any other. Raises ConfigError where `compare.methods` is empty.

    Args:
        config: The YAML file as a form; its section `compare` says what is trained.
        store: Where artifacts are kept: a folder of the worker's machine, or a URL such as s3://bucket/qrpo.
    """
    if not config.compare.methods:
        raise ConfigError(
            "compare.methods is empty: name what to compare, such as `dpo: {policy.loss: dpo, policy.beta: [0.1, 0.3]}`"
        )
    log = get_run_logger()
    every = list(candidates(config))
    for number, candidate in enumerate(every, start=1):
        log.info("%d of %d: %s", number, len(every), candidate.config.name)
        with tags(f"run:{candidate.config.name}"):
            for stage in STAGES:
                run_stage(stage, candidate.config, store)
    return judge(config, Store(store), every)


def judge(config: PipelineConfig, store: Store, every: Sequence[Candidate]) -> dict[str, Any]:
    """The comparison of finished candidates: what `qrpo.evaluation.comparison.compare_methods` says, and the reference's own scores."""
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
            "(prompts.eval_fraction), and look at the evaluations' rejects"
        )
    contenders: dict[str, list[Contender]] = {}
    for settings in {repr((one.method, one.settings)): one for one in every}.values():
        of_seeds = [
            one for one in every if (one.method, one.settings) == (settings.method, settings.settings)
        ]
        scores: dict[str, Floats] = {
            name: np.array([[by_prompt[one.config.name][name][p] for p in shared] for one in of_seeds])
            for name in SCORES
        }
        contenders.setdefault(settings.method, []).append(Contender(settings.settings, scores))
    report = compare_methods(contenders, shared, select_by=config.compare.select_by, seed=config.seed)
    reference: dict[str, float] = {}
    for name in _OWN:
        _, scores_of = prompt_scores(next(iter(tables.values())), name)
        reference[name] = float(scores_of["reference"].mean())
    plain: dict[str, Any] = json_numbers(
        {"run": config.name, "seeds": len(config.compare.seeds), **report, "reference": reference}
    )
    return plain


def comparison_table(report: dict[str, Any]) -> Table:
    """The report as a person reads it: one line a method."""
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


def _by_prompt(table: Any) -> dict[str, dict[str, float]]:
    """The policy's scores by name and prompt."""
    scores: dict[str, dict[str, float]] = {}
    for name in SCORES:
        prompt_ids, of_model = prompt_scores(table, name)
        scores[name] = dict(zip(prompt_ids, of_model["policy"].tolist(), strict=True))
    return scores
