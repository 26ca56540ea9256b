"""What would stop a run, found before its first sample: `qrpo plan` shows it, and a run that needs
the work raises it.

The checks cost seconds: the store takes a file and its disk has room, the extras are installed, the
model's files can be read, its tokenizer renders a prompt of the dataset, and the rewards score a
row of it.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from importlib.metadata import requires
from importlib.util import find_spec
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from qrpo.data.chat import encode_prompt, load_tokenizer
from qrpo.data.prompts import Prompt, parse_row
from qrpo.data.sources import read_rows
from qrpo.errors import ConfigError, DataError, QRPOError, RewardError
from qrpo.models import is_local, location, weight_count
from storage import Store, StoreError
from tasks.config import PipelineConfig
from tasks.planner import Planner
from tasks.stages.rewards import Scorer

_READ_ROWS = 200  # of the source, to find prompts
_PROMPTS = 4  # a reward that scores none of them scores nothing
_TIMEOUT = 20.0  # seconds for one call of a reward; a slower one is left to the run
_SAMPLED = {"completions", "shards", "policy", "evaluation"}  # stages that render prompts for the model
_COPIES = 2  # of the weights: the trained model, and a checkpoint


def preflight(planner: Planner, stages: Sequence[str]) -> list[Exception]:
    """Every problem that the stages would meet, each as the error that the stage would raise.
    Writes nothing.

    What the store already has is not checked, nor are the models and data sets of a hub.
    """
    config, store = planner.config, planner.store
    problems: list[Exception] = []
    missing = set(stages)
    try:
        if planner.plan("prompts").complete:  # else all plans are made again once it is
            missing = {stage for stage in stages if not planner.plan(stage).complete}
            if planner.plan("rewards").records:
                missing -= {"rewards"}  # they have scored rows
    except (QRPOError, StoreError, OSError) as error:
        problems.append(error)
    for check in (_store, _extras, _model, _rewards):
        try:
            problems += check(config, store, missing) if missing else ()
        except (QRPOError, StoreError, OSError) as error:
            problems.append(error)
    return list({str(problem): problem for problem in problems}.values())


def require_preflight(planner: Planner, stages: Sequence[str]) -> None:
    """Raise the problems of `preflight`, once for a planner."""
    if not planner.checked:
        raise_all(preflight(planner, stages))
        planner.checked = True


def raise_all(problems: Sequence[Exception]) -> None:
    """Raise the only problem, or ConfigError that lists all; nothing without any."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError("\n  - ".join([f"{len(problems)} problems:", *map(str, problems)]))


def _store(config: PipelineConfig, store: Store, missing: Set[str]) -> Iterator[Exception]:
    """A local store takes a file, and has room for what is trained."""
    place, model = store.local_path("parts"), config.reference.model
    if place is None:
        return
    there = next(folder for folder in place.parents if folder.exists())
    if there.is_file():  # the plan says so
        return
    try:
        tempfile.TemporaryFile(dir=there).close()  # has no name that anybody could see
    except OSError as error:
        yield ConfigError(
            f"the store {store.url} cannot be written ({error.strerror}): make {there} writable, or name another store "
            "with --store or QRPO_STORE"
        )
        return
    trained = {"policy"} if config.reference.sft is None else {"policy", "reference"}
    if missing & trained and is_local(model):
        weights = Path(location(model)).glob("*.safetensors")
        needed, free = _COPIES * sum(file.stat().st_size for file in weights), shutil.disk_usage(there).free
        if free < needed:
            yield DataError(
                f"the disk of the store {store.url} has {free / 2**20:,.0f} MiB free, and the trained model with a checkpoint "
                f"takes {needed / 2**20:,.0f} MiB: free space (`qrpo gc` shows what no run needs)"
            )


def _extras(config: PipelineConfig, store: Store, missing: Set[str]) -> Iterator[Exception]:
    """Packages that only some configurations need."""
    sampled = missing & {"completions", "evaluation"} and config.completions.engine.kind == "vllm"
    trained = {"policy": config.policy, "reference": config.reference.sft}
    adapted = any(stage in missing and section and section.lora for stage, section in trained.items())
    for module, key, extra, wanted in (
        ("vllm", "completions.engine.kind vllm", "cpu", sampled),
        ("peft", "lora", "peft", adapted),
        ("prefect_dask", "run.runner dask", "dask", config.run.runner == "dask"),
        ("prefect_ray", "run.runner ray", "ray", config.run.runner == "ray"),
    ):
        if wanted and find_spec(module) is None:
            listed = [text.partition(";") for text in requires("qrpo-pipeline") or ()]
            packages = [
                f"'{name.strip()}'"
                for name, _, marker in listed
                if f'extra == "{extra}"' in marker.replace("'", '"')
            ]
            install = f"{sys.executable} -m pip install {' '.join(packages)}"
            yield ConfigError(f"{key} needs {module}, which is not installed: {install}")


def _model(config: PipelineConfig, store: Store, missing: Set[str]) -> Iterator[Exception]:
    """The files of a local model can be read, and its tokenizer renders a prompt of the dataset."""
    model = config.reference.model
    if is_local(model) and missing & {"reference", *_SAMPLED}:
        weight_count(model)
    if is_local(model) and missing & _SAMPLED:
        tokenizer, errors = load_tokenizer(model), []
        for prompt in _prompts(config):
            try:
                encode_prompt(tokenizer, prompt.messages, prompt.tools)
                return
            except DataError as error:
                errors.append(error)
        yield from errors[:1]


def _rewards(config: PipelineConfig, store: Store, missing: Set[str]) -> Iterator[Exception]:
    """Every reward can be opened, and scores one of the first rows; a model or a judge costs too
    much to be called."""
    for reward in config.rewards if "rewards" in missing else ():
        changes = {"workers": 1, "timeout": _TIMEOUT, "weight": 1.0}
        quick = reward.model_copy(
            update={key: changes[key] for key in changes if key in type(reward).model_fields}
        )
        rows = [] if reward.kind in ("model", "judge") else list(map(_row, _prompts(config)))
        try:
            with tempfile.TemporaryDirectory() as folder, Scorer([quick], Path(folder, "log")) as scorer:
                errors = list(takewhile(bool, (_failure(scorer, row) for row in rows)))
        except QRPOError as error:
            yield error
            continue
        if rows and len(errors) == len(rows):
            yield RewardError(f"the reward {reward.name} scores no row of the dataset: {errors[0]}")


def _row(prompt: Prompt) -> dict[str, Any]:
    """A completion of the dataset's own for this prompt, or else the prompt itself."""
    own = {name: getattr(prompt, name) for name in ("messages", "conversational", "metadata")}
    text = (prompt.offline_completions or [str(prompt.messages[-1]["content"])])[0]
    return {**own, "text": text, "token_ids": [0]}


def _failure(scorer: Scorer, row: dict[str, Any]) -> str | None:
    """Why a row has no score; None also for a reward that does not apply to it, or is slow."""
    (score,) = scorer.score([row])
    passes = score.error is None or "no reward applies" in score.error or "(timeout)" in score.error
    return None if passes else score.error


def _prompts(config: PipelineConfig) -> list[Prompt]:
    """The first prompts of a source that is no hub dataset; none where it cannot be read, which the
    plan says if it is needed."""
    found: list[Prompt] = []
    if not config.prompts.source.startswith("hf://"):
        with suppress(DataError):
            for _, row in islice(read_rows(config.prompts.source), _READ_ROWS):
                with suppress(DataError):  # a reject of the stage `prompts`
                    found += [] if isinstance(row, DataError) else [parse_row(row, config.prompts)]
                if len(found) == _PROMPTS:
                    break
    return found
