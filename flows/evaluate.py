"""`qrpo evaluate`: a table of a run's models on its held-out prompts; several runs that differ in
their seed as one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group

from flows.pipeline_run import run_pipeline
from flows.views.results import SCORES, across_runs_lines, evaluation_view
from flows.views.runs import RunArtifacts, find_manifest, flatten
from qrpo.errors import ConfigError, DataError
from qrpo.evaluation.statistics import seeds_and_prompts
from qrpo.evaluation.summary import COLUMNS, prompt_scores
from storage import Store
from tasks.config import PipelineConfig, load_config, parse_config
from tasks.planner import planner_of


def run_config(
    store: Store,
    name: str,
    models: Mapping[str, str] | None = None,
    checkpoints: Sequence[str] = (),
    num_samples: int | None = None,
) -> PipelineConfig:
    """The configuration of a run of the store, or of a file, with more models to evaluate or other
    sample counts.

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
        if not kept or step not in ("all", *map(str, kept)):
            known = (
                ", ".join(map(str, kept)) or "none; a training run with policy.checkpoint_steps keeps some"
            )
            raise ConfigError(
                f"the policy of {config.name} has no checkpoint {'of step ' * (step != 'all')}{step}; its checkpoints: {known}"
            )
        raw["evaluation"]["checkpoints"] += kept if step == "all" else [int(step)]
    if num_samples is not None:
        raw["evaluation"]["num_samples"] = num_samples
    return parse_config(raw, where="qrpo evaluate")


def is_file(name: str) -> bool:
    """Whether a run is named by its configuration file."""
    return name.endswith((".yaml", ".yml"))


def require_trust(config: PipelineConfig, where: str, trust: bool) -> None:
    """Raise ConfigError if this configuration, which was read from a store, runs code other than
    this package's, unless `trust`."""
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


def evaluate_runs(
    configs: Mapping[str, PipelineConfig], store: Store, trust: bool
) -> tuple[dict[str, Any], Group]:
    """The evaluation of each run, computed if the store does not have it, and of several runs
    together; and its view.

    `configs` are by the name that the user gave: a run's, or a file's.
    """
    answer: dict[str, Any] = {"runs": {}}
    parts: list[Any] = []
    for name, config in configs.items():
        if not is_file(name) and not planner_of(config, store.url, "evaluation").plan("evaluation").complete:
            require_trust(config, f"run {name}", trust)
        result = run_pipeline(config, store, first="evaluation")
        if "evaluation" not in result:
            raise DataError(
                f"run {config.name} has no held-out prompts to evaluate on; set prompts.eval_fraction"
            )
        answer["runs"][name] = result["evaluation"]
        parts += evaluation_view(result["evaluation"])
    if len(configs) > 1:
        answer["together"] = across_runs(store, list(configs))
        parts += across_runs_lines(answer["together"])
    return answer, Group(*parts)


def across_runs(store: Store, names: Sequence[str]) -> dict[str, Any]:
    """Runs that differ in their seed as one: each score's mean and 95% interval over runs and
    prompts.

    Uses the prompts that all runs share. Raises DataError if there are none.
    """
    tables = [
        store.scan(find_manifest(store, name, "evaluation").parts).select(COLUMNS).collect().to_arrow()
        for name in names
    ]
    result: dict[str, Any] = {"runs": list(names)}
    for score in SCORES:
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
