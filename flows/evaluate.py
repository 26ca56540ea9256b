"""`qrpo evaluate`: a run's models on its held-out prompts, as a table, and several runs that differ in their seed as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flows.views.show import find_manifest
from qrpo.errors import ConfigError, DataError
from qrpo.evaluation.statistics import seeds_and_prompts
from qrpo.evaluation.summary import COLUMNS, prompt_scores
from storage import Store
from tasks.config import PipelineConfig, load_config, parse_config

__all__ = [
    "Cell",
    "across_runs",
    "comparison_table",
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
    """The configuration of a run of the store, or in a file, with more models to evaluate and another number of samples.

    `checkpoints` are steps of its training, or `all` that its policy keeps.
    """
    if name.endswith((".yaml", ".yml")):
        config = load_config(Path(name))
    else:
        noted = store.run(name)
        if noted is None:
            known = ", ".join(sorted(store.runs())) or "none yet"
            raise ConfigError(f"no run named {name!r} in {store.url}; its runs: {known}")
        config = parse_config(noted["config"], where=f"run {name}")
    raw = config.model_dump(mode="json")
    raw["evaluation"]["models"] |= {key: {"path": path} for key, path in (models or {}).items()}
    kept = kept_steps(store, config.name) if checkpoints else []
    for step in checkpoints:
        if step != "all" and step not in map(str, kept):
            known = (
                ", ".join(map(str, kept))
                or "none; policy.checkpoint_steps keeps some, in a training run of their own"
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
    """One number as a person reads it, and how sure it is."""

    value: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.note}".strip()


def comparison_table(summary: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """The models' names (and `optimum`, where theory says it), and a titled row of cells for each measure."""
    others = summary.get("others", {})
    described = [summary["reference"], summary["policy"], *others.values()]
    compared = [summary, *others.values()]
    theory = summary.get("theory")
    rows: list[tuple[str, list[Cell], str]] = []

    def every(title: str, cells: Sequence[Cell], promise: str = "") -> None:
        rows.append((title, list(cells), promise))

    def against(title: str, reference: str, cells: Sequence[Cell], promise: str = "") -> None:
        every(title, [Cell(reference), *cells], promise)

    promised = {name: f"{theory[name]:.3f}" for name in ("quantile_reward", "kl")} if theory else {}
    every("mean reward", [_measured(one["reward"]) for one in described])
    quantile = promised.get("quantile_reward", "")
    every("mean quantile reward", [_measured(one["quantile_reward"]) for one in described], quantile)
    against(
        "win rate against the reference", "0.5", [interval(one["win_rate"]) for one in compared], quantile
    )
    controlled = [one["length_controlled"] for one in compared]
    against("win rate at equal length", "0.5", [interval(one["win_rate"]) for one in controlled])
    against("reward gained", "", [_measured(one["reward_gain_unadjusted"]) for one in controlled])
    against("reward gained at equal length", "", [_measured(one["reward_gain"]) for one in controlled])
    slopes = [
        controlled[0]["reward_per_token"]["reference"],
        *(one["reward_per_token"]["model"] for one in controlled),
    ]
    every("reward per token of length", [_measured(slope, 4) for slope in slopes])
    against(
        "KL to the reference, nats", "0", [_measured(one["kl"]) for one in compared], promised.get("kl", "")
    )
    every("completion length, tokens", [_measured(one["length"], 2) for one in described])
    for key, title in (
        ("unique", "distinct completions of a prompt"),
        ("distinct_2", "distinct token pairs"),
        ("self_similarity", "overlap of two completions"),
    ):
        every(title, [_measured(one["diversity"][key]) for one in described])
    reasons = [
        Cell(", ".join(f"{reason} {count:,}" for reason, count in one["finish_reasons"].items()))
        for one in described
    ]
    every("finished by", reasons)
    names = ["reference", "policy", *others, *([f"optimum for beta {theory['beta']:g}"] if theory else [])]
    return names, [(title, [*cells, Cell(promise)] if theory else cells) for title, cells, promise in rows]


_BRIEF = {
    "mean reward",
    "mean quantile reward",
    "win rate against the reference",
    "KL to the reference, nats",
    "completion length, tokens",
}


def evaluation_table(summary: Mapping[str, Any], *, brief: bool = False) -> Table:
    """The comparison as a person reads it; `brief`: its main lines."""
    names, rows = comparison_table(summary)
    title = (
        f"{summary['prompts']} held-out prompts, {summary['policy']['samples']:,} fresh samples of each model"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name)
    for heading, cells in rows:
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
    """Runs that differ in their seed as one: each score's mean over runs and prompts, with what both add to its interval.

    Takes the prompts that all have in common; raises DataError where there are none.
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
