"""AlpacaEval 2: how often a judge prefers a model's answers to a baseline's, unadjusted and at
equal length.

The `alpaca-eval` package does the judging and the statistics. This module adds its file formats,
and a judge behind any OpenAI-compatible URL. The baseline's published outputs
(`alpaca_eval_gpt4_baseline.json`: a list of `instruction`, `output`, `generator`, `dataset`) are
also the list of prompts.

The length-controlled win rate is the package's regression. The published one
(`length_controlled_v1`) needs the difficulty of each instruction: the file `df_gamed.csv` of
tatsu-lab/alpaca_eval on the Hugging Face Hub. Without it the package's `length_controlled_minimal`
is used, which knows lengths only: close to the leaderboard's number, not equal.
"""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from qrpo.config import Section, execution_option
from qrpo.errors import ConfigError, DataError, EngineError
from qrpo.evaluation.suites.files import read_rows
from qrpo.processes.child import Child

_FOLDS = 5  # the package cross-validates its regression


class AlpacaEvalJudge(Section):
    """The judge."""

    annotator: str = "weighted_alpaca_eval_gpt4_turbo"
    """A configuration in the package's evaluators_configs: prompt and parser."""
    model: str | None = None
    """The judge's name at its server; by default the one in the configuration."""
    url: str | None = None
    """An OpenAI-compatible URL such as http://localhost:8000/v1; by default OpenAI's."""
    api_key: str = execution_option("OPENAI_API_KEY")
    """The environment variable with the API key; a local server needs none."""
    options: dict[str, Any] = Field(default_factory=dict)
    """More arguments of a request: `temperature`, `top_logprobs`, ..."""
    concurrency: int = execution_option(5, ge=1)
    """Concurrent requests."""


def read_baseline(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The baseline's rows in the published order, the first `limit` of them."""
    return read_rows(path, ("instruction", "output"))[:limit]


def model_outputs(
    baseline: Sequence[Mapping[str, Any]], answers: Mapping[int, str], generator: str
) -> list[dict[str, Any]]:
    """A model's answers, by row of the baseline, in the package's format."""
    return [
        {
            "instruction": row["instruction"],
            "output": answers[number],
            "generator": generator,
            "dataset": row.get("dataset", ""),
        }
        for number, row in enumerate(baseline)
        if number in answers
    ]


def write_outputs(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as the package reads them: one JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False), encoding="utf-8")


def judge_outputs(
    outputs: Path,
    baseline: Path,
    folder: Path,
    judge: AlpacaEvalJudge,
    *,
    difficulty: Path | None = None,
    log: Path | None = None,
) -> dict[str, Any]:
    """Let the package judge `outputs` against `baseline`, row by row; return percentages and
    counts, for JSON.

    Annotations are stored in `folder`, so no judgement is paid for twice. `difficulty` is
    df_gamed.csv. Keys: `win_rate`, `standard_error`, `discrete_win_rate`,
    `length_controlled_win_rate`, `length_controlled_standard_error`, `length_control` (the
    regression's name), `judged`, `unreadable`, `mean_length` and `baseline_length` in characters.
    Raises ConfigError if the package or the judge's key is missing, EngineError if the judge does
    not answer, DataError if no judgement could be read.
    """
    environment = {"OPENAI_MAX_CONCURRENCY": str(judge.concurrency), "IS_ALPACA_EVAL_2": "True"}
    key = os.environ.get(judge.api_key)
    if key is None and judge.url is None:
        raise ConfigError(
            f"alpaca-eval: the environment has no {judge.api_key}, which OpenAI's judge needs; set it, or name your "
            "server in judge.url"
        )
    environment["OPENAI_API_KEY"] = environment["OPENAI_API_KEYS"] = key or "none"
    if judge.url is not None:
        environment["OPENAI_API_BASE"] = judge.url
        environment["OPENAI_CLIENT_CONFIG_PATH"] = os.devnull + "/none"
    folder.mkdir(parents=True, exist_ok=True)
    config = _annotator_config(judge, folder)
    child = Child(f"{__name__}:_Package", name="the alpaca-eval package", log=log, env=environment)
    try:
        result: dict[str, Any] = child.call("judge", outputs, baseline, folder, config, difficulty)
    finally:
        child.close()
    return result


class _Package:
    """The package in a child process: it reads the environment at import."""

    def judge(
        self, outputs: Path, baseline: Path, folder: Path, config: Path, difficulty: Path | None
    ) -> dict[str, Any]:
        import openai
        import pandas as pd  # type: ignore[import-untyped]
        from alpaca_eval import annotators, metrics  # type: ignore[import-untyped]

        annotator = annotators.PairwiseAnnotator(
            annotators_config=str(config.resolve()), caching_path=str(folder / "judgements.json")
        )
        # rows instead of paths: the package reads a text of digits as a number
        theirs, mine = (json.loads(path.read_text(encoding="utf-8")) for path in (baseline, outputs))
        try:
            annotations = pd.DataFrame(annotator.annotate_head2head(outputs_1=theirs, outputs_2=mine))
        except openai.OpenAIError as error:
            raise EngineError(
                f"the judge cannot be asked: {error}. Check its url, the model's name and the key"
            ) from None
        annotations.to_json(folder / "annotations.json", orient="records", indent=1)
        annotations["preference"] = pd.to_numeric(annotations["preference"])
        readable = annotations[annotations["preference"].notna()]
        if not len(readable):
            raise DataError(
                f"alpaca-eval: none of the judge's {len(annotations)} answers could be read; see "
                f"{folder / 'annotations.json'}. A judge that names neither answer among its likeliest tokens needs a "
                "larger judge.options.top_logprobs"
            )
        rates = metrics.get_winrate(readable)
        return {
            **{name: float(rates[name]) for name in ("win_rate", "standard_error", "discrete_win_rate")},
            **_length_controlled(annotations, folder, difficulty),
            "judged": len(readable),
            "unreadable": len(annotations) - len(readable),
            "mean_length": float(annotations["output_2"].str.len().mean()),
            "baseline_length": float(annotations["output_1"].str.len().mean()),
        }


def _annotator_config(judge: AlpacaEvalJudge, folder: Path) -> Path:
    """Write the package's configuration of the judge with the user's changes into `folder`."""
    package = find_spec("alpaca_eval")
    if package is None or package.origin is None:
        raise ConfigError(
            "the alpaca-eval package is not installed: pip install 'qrpo-pipeline[alpaca-eval]'"
        )
    shipped = Path(package.origin).parent / "evaluators_configs"
    source = shipped / judge.annotator / "configs.yaml"
    if not source.is_file():
        raise ConfigError(
            f"judge.annotator: alpaca-eval has no configuration {judge.annotator!r}; they are in {shipped}"
        )
    ((name, config),) = yaml.safe_load(source.read_text()).items()
    arguments = config["completions_kwargs"]
    if judge.url is not None:
        arguments |= {"requires_chatml": True, "price_per_token": 0}
    if judge.model is not None:
        arguments["model_name"] = judge.model
        name = f"{name}-{judge.model}".replace("/", "_")
    arguments |= judge.options
    config["prompt_template"] = str(shipped / config["prompt_template"])
    path = folder / "judge.yaml"
    path.write_text(yaml.safe_dump({name: config}, sort_keys=False))
    return path


def _length_controlled(annotations: Any, folder: Path, difficulty: Path | None) -> dict[str, Any]:
    """The package's length-controlled win rate, with its download replaced by a local file."""
    from alpaca_eval.metrics import glm_winrate  # type: ignore[import-untyped]

    keys = ("length_controlled_win_rate", "length_controlled_standard_error")
    readable = annotations["preference"].notna().sum()
    if readable < _FOLDS:
        return {**dict.fromkeys(keys), "length_control": f"none: {readable} judgements, {_FOLDS} are needed"}
    name = "length_controlled_v1" if difficulty else "length_controlled_minimal"
    if difficulty is None:
        # the package reads this file even if the regression has no term for it
        difficulty = folder / "no_difficulty.csv"
        lines = [f"none,{index},0.0\n" for index in range(len(annotations))]
        difficulty.write_text("model,index,instruction_difficulty\n" + "".join(lines))
    glm_winrate.hf_hub_download = lambda **_: str(difficulty)
    metrics = glm_winrate.get_length_controlled_winrate(
        annotations.copy(), glm_name=name, save_weights_dir=None, is_warn_extreme_changes=False
    )
    values = (float(metrics["length_controlled_winrate"]), float(metrics["lc_standard_error"]))
    return {**dict(zip(keys, values, strict=True)), "length_control": name}
