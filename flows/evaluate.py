"""`qrpo evaluate`: a table of a run's models on its held-out prompts; several runs that differ in their seed as one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from flows.views.runs import RunArtifacts, find_manifest, flatten
from qrpo.errors import ConfigError, DataError
from qrpo.evaluation.statistics import seeds_and_prompts
from qrpo.evaluation.summary import COLUMNS, prompt_scores
from storage import Store
from tasks.artifact_summary import MAIN_MEASURES, compare_models, interval
from tasks.config import PipelineConfig, load_config, parse_config

__all__ = [
    "across_runs",
    "evaluation_table",
    "is_file",
    "named_models",
    "print_comparison",
    "require_trust",
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
    if is_file(name):
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


def is_file(name: str) -> bool:
    """Whether a run is named by its configuration file."""
    return name.endswith((".yaml", ".yml"))


def require_trust(config: PipelineConfig, where: str, trust: bool) -> None:
    """Raise ConfigError if this configuration, which was read from a store, runs code other than this package's, unless
    `trust`."""
    named = {"function", "transform"}
    code = [
        f"{path} {text}"
        for path, text in flatten(config.model_dump(mode="json")).items()
        if (path.endswith("trust_remote_code") and text == "true")
        or (path.rpartition(".")[2] in named and ":" in text and not text.startswith('"qrpo.'))
    ]
    if code and not trust:
        raise ConfigError(
            f"{where}: its configuration comes from the store and runs code ({'; '.join(code)}). Who can write to the store "
            "chose it. Give the configuration file instead of the run's name, or add --trust"
        )


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


def evaluation_table(summary: Mapping[str, Any], *, brief: bool = False) -> Table:
    """The comparison for a terminal; `brief`: its main lines."""
    names, rows = compare_models(summary)
    samples = summary["policy"]["samples"]
    title = f"{summary['prompts']} held-out prompts, {samples:,} fresh samples of each model"
    table = Table(Column("", no_wrap=True), *names, title=title, title_justify="left")
    for heading, cells in rows.items():
        if heading in MAIN_MEASURES or not brief:
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
