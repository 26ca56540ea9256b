"""`qrpo evaluate --suite`: a run's model on a public suite, its completions and results in a folder
of files."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.views.runs import find_manifest
from qrpo.config import keyed
from qrpo.engines.sampling import SamplingConfig
from qrpo.errors import ConfigError
from qrpo.evaluation.suites.alpaca_eval import (
    AlpacaEvalJudge,
    judge_outputs,
    model_outputs,
    read_baseline,
    write_outputs,
)
from qrpo.models import ModelConfig, model_identity
from storage import Store, fingerprint
from tasks.config import PipelineConfig, apply_overrides
from tasks.stages.policy import checkpoint_model


@dataclass(frozen=True)
class SuiteRequest:
    """A model of a run on a suite's file: `policy`, `reference`, `step-N` or a model of
    evaluation.models."""

    store: Store
    config: PipelineConfig
    model_name: str
    data: Path
    folder: Path
    num_samples: int | None
    limit: int | None
    changes: Mapping[str, Any]
    """Sampling settings in place of the run's, but for None."""

    def __post_init__(self) -> None:
        assert self.model  # an unknown model is an error before any work
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def sampling(self) -> SamplingConfig:
        """The run's sampling unless the request says otherwise."""
        given = {name: value for name, value in self.changes.items() if value is not None}
        return self.config.completions.sampling.model_copy(update=given)

    @cached_property
    def model(self) -> ModelConfig:
        """The model's weights. Raises ConfigError if the run has no such model."""
        return _model(self.store, self.config, self.model_name)


def alpaca_eval(
    request: SuiteRequest, judge: AlpacaEvalJudge, difficulty: Path | None = None
) -> dict[str, Any]:
    """Answer the baseline's instructions, let the judge compare, and write both and the result into
    the folder."""
    baseline, folder = read_baseline(request.data, request.limit), request.folder
    prompts = {str(number): _user(row["instruction"]) for number, row in enumerate(baseline)}
    drawn, refused = _draw(request, "alpaca-eval", prompts, num_samples=1)
    texts = {int(key): texts[0] for key, texts in drawn.items()}
    answered = [{"generator": "baseline", **row} for number, row in enumerate(baseline) if number in texts]
    outputs, baselines = folder / "outputs.json", folder / "baseline.json"
    write_outputs(outputs, model_outputs(baseline, texts, request.model_name))
    write_outputs(baselines, answered)
    log = folder / "log.txt"
    judged = judge_outputs(outputs, baselines, folder, judge, difficulty=difficulty, log=log)
    return _finish(request, "alpaca-eval", {"judge": judge.model_dump(mode="json"), **judged}, refused)


def leetcode(request: SuiteRequest) -> dict[str, Any]:
    """Let the model solve the problems, run the tests, and write solutions and the result into the
    folder."""
    from qrpo.evaluation.suites.leetcode import read_problems, score_solutions
    from qrpo.rewards import CodeRewardConfig

    problems = read_problems(request.data, request.limit)
    prompts = {row["task_id"]: _user(row["query"]) for row in problems}
    drawn, refused = _draw(request, "leetcode", prompts, num_samples=request.num_samples or 1)
    reward = next((reward for reward in request.config.rewards if isinstance(reward, CodeRewardConfig)), None)
    scored, rows = score_solutions(problems, drawn, reward=reward, seed=request.config.seed)
    with (request.folder / "solutions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return _finish(request, "leetcode", scored, refused)


SUITES: dict[str, Callable[[SuiteRequest, AlpacaEvalJudge, Path | None], dict[str, Any]]] = {
    "alpaca-eval": alpaca_eval,
    "leetcode": lambda request, judge, difficulty: leetcode(request),
}
"""What --suite names; the judge and the difficulty are AlpacaEval's."""


def judge_of(settings: Sequence[str]) -> AlpacaEvalJudge:
    """The judge of KEY=VALUE settings; ConfigError for an unknown key or an impossible value."""
    try:
        return AlpacaEvalJudge.model_validate(apply_overrides({}, settings))
    except ValidationError as error:
        (first, *_) = error.errors()
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"--judge {key}: {first['msg']}; its settings are {', '.join(AlpacaEvalJudge.model_fields)}"
        ) from None


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _model(store: Store, config: PipelineConfig, name: str) -> ModelConfig:
    base = config.reference.model
    if name in config.evaluation.models:
        return config.evaluation.models[name]
    if name == "reference" and config.reference.sft is None:
        return base
    if step := re.fullmatch(r"step-(\d+)", name):
        return checkpoint_model(_model(store, config, "policy"), int(step[1]))
    if name not in ("policy", "reference"):
        known = ", ".join(("policy", "reference", "step-N", *config.evaluation.models))
        raise ConfigError(f"the run has no model {name!r}; it has {known}")
    (part,) = find_manifest(store, config.name, name).parts
    return base.model_copy(update={"path": str(store.fetch_folder(part)), "revision": None})


def _draw(
    request: SuiteRequest, suite: str, prompts: Mapping[str, list[dict[str, str]]], num_samples: int
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Each prompt's texts, and the refused prompts; from the folder if the same was drawn
    before."""
    from qrpo.evaluation.suites.completions import draw_completions

    section = request.config.completions
    asked = {
        "model": model_identity(request.model),
        "prompts": dict(prompts),
        "engine": keyed(section.engine),
        "sampling": keyed(request.sampling),
        "num_samples": num_samples,
        "seed": request.config.seed,
    }
    path, key = request.folder / "completions.json", fingerprint(asked)
    earlier = fingerprint({**asked, "model": model_identity(request.model, every_file=True)})
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["fingerprint"] in (key, earlier):
            return kept["texts"], kept["refused"]
    drawn = draw_completions(
        request.model,
        prompts,
        engine=section.engine,
        sampling=request.sampling,
        num_samples=num_samples,
        seed=request.config.seed,
        namespace=suite,
        log=request.folder / "log.txt",
    )
    texts = {name: [sample.text for sample in samples] for name, samples in drawn.samples.items()}
    kept = {"fingerprint": key, "texts": texts, "refused": drawn.refused}
    path.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    return texts, drawn.refused


def _finish(
    request: SuiteRequest, suite: str, scored: Mapping[str, Any], refused: Mapping[str, str]
) -> dict[str, Any]:
    result = {
        "suite": suite,
        "run": request.config.name,
        "model": request.model_name,
        "folder": str(request.folder),
        "sampling": request.sampling.model_dump(mode="json"),
        "refused": dict(refused),
        **scored,
    }
    (request.folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result
