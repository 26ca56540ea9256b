"""A whole pipeline on a tiny model, with what was really done counted: samples drawn, completions scored, steps trained."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import polars as pl
import pytest

from flows.views.plan import preview
from qrpo.config import Section
from qrpo.engines.transformers import TransformersEngine
from qrpo.models.limits import model_limits
from storage import Store, row_digest
from tasks.config import PipelineConfig, apply_overrides, parse_config
from tasks.planner import Planner, plan_pipeline
from tasks.run_stage import StageResult, run_stage
from tasks.stages import STAGE_NAMES, STAGES, completions, evaluation
from tests.support.flows import copy_store

REWARD = """\
from pathlib import Path

CALLS = Path(__file__).with_name("calls.txt")


def length(prompts, completions, **columns):
    with CALLS.open("a") as file:
        file.write("length\\n" * len(completions))
    return [float(len(text)) for text in completions]


def letters(prompts, completions, **columns):
    with CALLS.open("a") as file:
        file.write("letters\\n" * len(completions))
    return [float(len(set(text))) for text in completions]
"""


class TinyPipeline:
    """A folder with prompts and rewards, a store, and one configuration of all stages, fine-tuning included.

    The store is in this process's memory, so every stage computes in this process and starts no child.
    """

    def __init__(self, folder: Path, model: Path, store: Store | None = None) -> None:
        self.folder, self.model = folder, model
        self.store = store or Store(f"memory://{uuid4().hex}")

    @classmethod
    def create(cls, folder: Path, model: Path, prompts: int = 24) -> Self:
        """Write the inputs."""
        folder.mkdir(parents=True)
        (folder / "reward.py").write_text(REWARD)
        made = cls(folder, model)
        made.write_prompts(range(prompts))
        return made

    def write_prompts(self, numbers: Iterable[int]) -> None:
        """Write one prompt for each number."""
        rows = [{"prompt": f"count to {n}", "chosen": "one two", "rejected": "no"} for n in numbers]
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def copy(self, folder: Path, store: Store | None = None) -> Self:
        """The same with a copy of the store, by default in memory, where nothing has been called yet."""
        shutil.copytree(self.folder, folder)
        (folder / "calls.txt").unlink(missing_ok=True)
        copied = type(self)(folder, self.model, store)
        copy_store(self.store, copied.store)
        return copied

    def config(self, changes: dict[str, Any] | None = None) -> PipelineConfig:
        """The configuration with some keys set by their dotted path."""
        reward = {"kind": "function", "name": "length", "function": f"{self.folder / 'reward.py'}:length"}
        training = {"learning_rate": 1e-3, "max_steps": 2, "prompts_per_step": 8}
        raw: dict[str, Any] = {
            "name": "tiny",
            "prompts": {"source": str(self.folder / "prompts.jsonl"), "eval_fraction": 0.25},
            "reference": {"model": {"path": str(self.model)}, "sft": training},
            "completions": {
                "num_ref": 4,
                "samples_per_part": 2,
                "engine": {"kind": "transformers", "max_num_seqs": 128},
                "sampling": {"max_tokens": 6},
            },
            "rewards": [reward],
            "quantiles": {"num_completions": 2, "equal_rewards": "keep"},
            "policy": training,
            "evaluation": {"num_samples": 2},
            "run": {"part_size": 8},
        }
        settings = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
        return parse_config(apply_overrides(raw, settings))

    def run(self, config: PipelineConfig, until: str = STAGE_NAMES[-1]) -> dict[str, StageResult]:
        """Run the stages up to `until`, in one Prefect flow where anything is to be computed."""
        from prefect import flow

        names = STAGE_NAMES[: STAGE_NAMES.index(until) + 1]
        planner = Planner(config, self.store)

        def tiny() -> list[StageResult]:
            return [run_stage(name, config, self.store.url, planner=planner) for name in names]

        cached = all(planner.plan(name).complete for name in names)
        return {result.stage: result for result in (tiny() if cached else flow(name="tiny")(tiny)())}

    def plan(self, config: PipelineConfig) -> dict[str, dict[str, Any]]:
        """What `qrpo plan --json` says of each stage."""
        stages: dict[str, dict[str, Any]] = preview(config, self.store)["stages"]
        return stages

    def scored(self) -> list[str]:
        """The rewards that were called, once for each completion."""
        path = self.folder / "calls.txt"
        return path.read_text().split() if path.exists() else []

    def row_digests(self, config: PipelineConfig) -> dict[str, int]:
        """The digest of every table's rows, in any cut."""
        plans = plan_pipeline(config, self.store)
        return {
            name: sum(row_digest(self.store.read_part(record)) for record in plans[name].records.values())
            % 2**256
            for name, stage in STAGES.items()
            if stage.table is not None
        }

    def weights(self, config: PipelineConfig, stage: str = "policy") -> dict[str, str]:
        """File name -> sha256 of the stage's model."""
        (record,) = plan_pipeline(config, self.store)[stage].records.values()
        return {file.name: file.sha256 for file in record.files if file.name.endswith(".safetensors")}

    def losses(self, config: PipelineConfig) -> list[float]:
        """The loss of every training step of the policy."""
        (record,) = plan_pipeline(config, self.store)["policy"].records.values()
        folder = self.store.fetch_folder(record)
        return pl.read_parquet(folder / "metrics.parquet")["loss"].drop_nulls().to_list()


class EngineHere:
    """The transformers engine in this process; notes the samples that it is asked for in `drawn`."""

    def __init__(self, config: Any, model: Any, drawn: list[tuple[str, int]]) -> None:
        if config.dtype != "auto":
            model = model.model_copy(update={"dtype": config.dtype})
        limits = model_limits(model, config.max_model_len)
        self.max_model_len = limits.max_length
        self._engine, self._drawn = TransformersEngine(config, model, limits), drawn

    def sample(self, requests: Sequence[Any], sampling: Any) -> Iterator[Any]:
        self._drawn += [(request.key, index) for request in requests for index, _ in request.samples]
        return self._engine.sample(requests, sampling)


def sample_here(patch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Let all stages sample in this process; the samples that they ask for."""
    drawn: list[tuple[str, int]] = []
    for module in (completions, evaluation):
        patch.setattr(module, "engine_for", lambda config, model, log: EngineHere(config, model, drawn))
    return drawn


def fields_of(section: Section, path: str = "") -> Iterator[tuple[str, type[Section], str, Any]]:
    """(dotted path, section, field, value) of every field of a configuration, sections of sections included."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from fields_of(value, f"{path}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                yield from fields_of(item, f"{path}{name}.{index}.")
        else:
            yield f"{path}{name}", type(section), name, value
