"""`qrpo evaluate`: a table of a run's models on its held-out prompts; several runs that differ in their seed as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from flows.views.runs import RunArtifacts, find_manifest
from qrpo.errors import ConfigError, DataError
from qrpo.evaluation.statistics import seeds_and_prompts
from qrpo.evaluation.summary import COLUMNS, prompt_scores
from storage import Store
from tasks.config import PipelineConfig, load_config, parse_config

__all__ = [
    "Cell",
    "across_runs",
    "compare_models",
    "evaluation_table",
    "interval",
    "kept_steps",
    "named_models",
    "print_comparison",
    "run_config",
]


def run_config(
    store: Store,
    name: str,
    models: Mapping[str, str] | None = None,
    checkpoints: Sequence[str] = (),
    num_samples: int | None = None,
) -> PipelineConfig:
    """The configuration of a run of the store, or of a file, with more models to evaluate or other sample counts.

    `checkpoints` are steps of its training, or `all` that its policy keeps.
    """
    if name.endswith((".yaml", ".yml")):
        config = load_config(Path(name))
    else:
        config = parse_config(RunArtifacts(store, name).noted["config"], where=f"run {name}")
    raw = config.model_dump(mode="json")
    raw["evaluation"]["models"] |= {key: {"path": path} for key, path in (models or {}).items()}
    kept = kept_steps(store, config.name) if checkpoints else []
    for step in checkpoints:
        if step != "all" and step not in map(str, kept):
            known = (
                ", ".join(map(str, kept)) or "none; a training run with policy.checkpoint_steps keeps some"
            )
            raise ConfigError(
                f"the policy of {config.name} has no checkpoint of step {step}; its checkpoints: {known}"
            )
        raw["evaluation"]["checkpoints"] += kept if step == "all" else [int(step)]
    if num_samples is not None:
        raw["evaluation"]["num_samples"] = num_samples
    return parse_config(raw, where="qrpo evaluate")


def kept_steps(store: Store, run: str) -> list[int]:
    """The steps whose models the run's policy keeps."""
    (policy,) = find_manifest(store, run, "policy").parts
    names = [file.name.split("/") for file in policy.payload]
    return sorted({int(name[1]) for name in names if name[0] == "checkpoints"})


def named_models(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=PATH options as a mapping; ConfigError for anything else."""
    models = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ConfigError(
                f"--model {pair}: expected NAME=PATH, such as --model step-200=./checkpoint-200"
            )
        models[name] = path
    return models


@dataclass(frozen=True)
class Cell:
    """One number as text, and its error or interval."""

    value: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.note}".strip()


def compare_models(summary: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Cell]]]:
    """The models' names (and the optimum, if the loss has a theory), and title -> cells of each measure."""
    others = summary.get("others", {})
    described = [summary["reference"], summary["policy"], *others.values()]
    compared = [summary, *others.values()]
    controlled = [one["length_controlled"] for one in compared]
    slopes = [one["reward_per_token"]["model"] for one in controlled]

    def each(key: str, digits: int = 3) -> list[Cell]:
        return [_measured(one[key], digits) for one in described]

    def diversity(key: str) -> list[Cell]:
        return [_measured(one["diversity"][key]) for one in described]

    def gains(key: str) -> list[Cell]:
        return [Cell(), *(_measured(one[key]) for one in controlled)]

    rows = {
        "mean reward": each("reward"),
        "mean quantile reward": each("quantile_reward"),
        "win rate against the reference": [Cell("0.5"), *(interval(one["win_rate"]) for one in compared)],
        "win rate at equal length": [Cell("0.5"), *(interval(one["win_rate"]) for one in controlled)],
        "reward gained": gains("reward_gain_unadjusted"),
        "reward gained at equal length": gains("reward_gain"),
        "reward per token of length": [
            _measured(slope, 4) for slope in (controlled[0]["reward_per_token"]["reference"], *slopes)
        ],
        "KL to the reference, nats": [Cell("0"), *(_measured(one["kl"]) for one in compared)],
        "completion length, tokens": each("length", 2),
        "distinct completions of a prompt": diversity("unique"),
        "distinct token pairs": diversity("distinct_2"),
        "overlap of two completions": diversity("self_similarity"),
        "finished by": [
            Cell(", ".join(f"{reason} {count:,}" for reason, count in one["finish_reasons"].items()))
            for one in described
        ],
    }
    names = ["reference", "policy", *others]
    if theory := summary.get("theory"):
        names.append(f"optimum for beta {theory['beta']:g}")
        optimum = {
            "mean quantile reward": theory["quantile_reward"],
            "win rate against the reference": theory["quantile_reward"],
            "KL to the reference, nats": theory["kl"],
        }
        for title, cells in rows.items():
            cells.append(Cell(f"{optimum[title]:.3f}" if title in optimum else ""))
    return names, rows


_BRIEF = {
    "mean reward",
    "mean quantile reward",
    "win rate against the reference",
    "KL to the reference, nats",
    "completion length, tokens",
}


def evaluation_table(summary: Mapping[str, Any], *, brief: bool = False) -> Table:
    """The comparison for a terminal; `brief`: its main lines."""
    names, rows = compare_models(summary)
    samples = summary["policy"]["samples"]
    title = f"{summary['prompts']} held-out prompts, {samples:,} fresh samples of each model"
    table = Table(Column("", no_wrap=True), *names, title=title, title_justify="left")
    for heading, cells in rows.items():
        if heading in _BRIEF or not brief:
            table.add_row(heading, *map(str, cells))
    return table


def print_comparison(summary: Mapping[str, Any], console: Console) -> None:
    """The comparison, how far its draws differ, and which model is the best."""
    console.print(evaluation_table(summary))
    draws = np.array(summary["policy"]["reward_by_draw"])
    if len(draws) > 1:
        console.print(
            f"mean reward of the policy by draw: {draws.min():.4f} to {draws.max():.4f} over {len(draws)}"
        )
    if best := summary.get("best"):
        console.print(
            f"best by reward on {best['selection_prompts']} prompts: {best['best']}; on the {best['report_prompts']} others "
            f"{interval(best['reported'])}"
        )


def across_runs(store: Store, names: Sequence[str]) -> dict[str, Any]:
    """Runs that differ in their seed as one: each score's mean and 95% interval over runs and prompts.

    Uses the prompts that all runs share. Raises DataError if there are none.
    """
    tables = [
        store.scan(find_manifest(store, name, "evaluation").parts).select(COLUMNS).collect().to_arrow()
        for name in names
    ]
    result: dict[str, Any] = {"runs": list(names)}
    for score in ("reward", "quantile_reward", "win_rate", "kl", "length"):
        scored = [prompt_scores(table, score) for table in tables]
        shared = sorted(set.intersection(*(set(prompt_ids) for prompt_ids, _ in scored)))
        if not shared:
            raise DataError(
                f"the runs {', '.join(names)} have no held-out prompt in common, so they are no seeds of one"
            )
        values = np.stack(
            [scores["policy"][[prompt_ids.index(one) for one in shared]] for prompt_ids, scores in scored]
        )
        result["prompts"] = len(shared)
        result[score] = seeds_and_prompts(values)
    return result


def _measured(value: Mapping[str, Any], digits: int = 3) -> Cell:
    if value["mean"] is None:
        return Cell("-")
    error = value["standard_error"]
    return Cell(f"{value['mean']:.{digits}f}", f"± {error:.{digits}f}" if error is not None else "")


def interval(value: Mapping[str, Any]) -> Cell:
    """A mean with its 95% interval."""
    return Cell(f"{value['mean']:.3f}", f"({value['low']:.3f} to {value['high']:.3f})")
