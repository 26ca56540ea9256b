"""The pipeline's configuration: one YAML file, one section a stage, composed from the sections that
the stages declare.

Unknown keys are refused with their path, and every default is visible with
`qrpo run CONFIG --show-config`. Paths in the file are taken from the current folder, as in a shell.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from qrpo.config import Section, Seed, is_execution_option
from qrpo.data.prompts import PromptsConfig
from qrpo.errors import ConfigError
from qrpo.rewards import RewardConfig
from qrpo.training.settings import PolicyConfig
from tasks.config_yaml import read_yaml, write_yaml
from tasks.sections import CompareConfig, RoundsConfig, RunConfig
from tasks.stages import STAGES
from tasks.stages.completions import CompletionsConfig
from tasks.stages.evaluation import EvaluationConfig
from tasks.stages.quantiles import QuantilesConfig
from tasks.stages.reference import ReferenceConfig
from tasks.stages.shards import ShardsConfig


class PipelineConfig(Section):
    """Everything that decides what a run computes."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", json_schema_extra={"fingerprint": False}
    )
    """The run's name: `runs/<name>.json` in the store says what it produced."""
    seed: Seed = 0
    """Seed of everything random: sampling, splits, shuffles, training."""
    prompts: PromptsConfig
    """Where the prompts come from."""
    reference: ReferenceConfig
    """The reference policy, and whether to fine-tune it first."""
    completions: CompletionsConfig
    """Sampling from the reference policy."""
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    """One or several rewards; a completion's reward is their weighted sum."""
    quantiles: QuantilesConfig = QuantilesConfig()
    """Which completions are trained on, and how their rewards become quantiles."""
    shards: ShardsConfig = ShardsConfig()
    """The training shards and their reference log-probabilities."""
    policy: PolicyConfig = PolicyConfig()
    """The training run."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Policy against reference on held-out prompts."""
    rounds: RoundsConfig = RoundsConfig()
    """Going on from a trained policy, on its own samples."""
    compare: CompareConfig = CompareConfig()
    """What `qrpo compare` trains."""
    run: RunConfig = RunConfig()
    """How the work is cut and when a run gives up."""

    @property
    def subject(self) -> str:
        """Which prompts and which model, in a few words: run names say it."""
        return f"{self.prompts.name}, {self.reference.model.path.rstrip('/').rsplit('/', 1)[-1]}"

    @model_validator(mode="after")
    def _trainable(self) -> "PipelineConfig":
        for name, section in (("policy", self.policy), ("reference.sft", self.reference.sft)):
            if section is not None and section.needs_check:
                from qrpo.training.trainer_arguments import check_arguments

                try:
                    check_arguments(section)
                except ConfigError as error:
                    raise ValueError(f"{name}: {error}") from None
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "PipelineConfig":
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: the names must differ, got {names}; give each reward a `name`")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so no completion has a reward; give one a weight")
        train_on = self.quantiles.num_completions
        samples_itself = self.quantiles.train_on in ("reference", "both")
        if samples_itself and train_on is not None and train_on > self.completions.num_ref:
            raise ValueError(
                f"quantiles.num_completions is {train_on} but completions.num_ref is {self.completions.num_ref}: "
                "training completions are taken from the reference samples, so it cannot be larger"
            )
        if (self.quantiles.train_on == "policy") != (self.rounds.from_run is not None):
            raise ValueError(
                f"quantiles.train_on is {self.quantiles.train_on} and rounds.from_run is {self.rounds.from_run}: to train on "
                "a policy's samples, set the first to policy and the second to the run that made it; rounds.count does both"
            )
        if self.quantiles.num_ref is not None:
            if samples_itself and train_on is None:
                raise ValueError(
                    "quantiles.num_ref is set but quantiles.num_completions is null: every sample is trained on, "
                    "and none is left to take quantiles among; set num_completions"
                )
            needed = self.quantiles.num_ref + ((train_on or 0) if samples_itself else 0)
            if needed > self.completions.num_ref:
                raise ValueError(
                    f"quantiles.num_ref needs {needed} samples of each prompt, those trained on included, but "
                    f"completions.num_ref is {self.completions.num_ref}: raise that"
                )
        if (
            self.policy.loss != "qrpo"
            and self.policy.pairs == "dataset"
            and self.quantiles.train_on in ("reference", "policy")
        ):
            raise ValueError(
                f"policy.pairs is `dataset` but quantiles.train_on is `{self.quantiles.train_on}`: the dataset's own "
                "completions are not trained on; set quantiles.train_on to offline or both, or policy.pairs to best-worst or random"
            )
        if (
            self.policy.loss in ("dpo", "rebel", "simpo")
            and self.quantiles.train_on == "reference"
            and (train_on or self.completions.num_ref) < 2
        ):
            raise ValueError(
                f"policy.loss {self.policy.loss} needs two completions of each prompt, and there is one: raise "
                "quantiles.num_completions and completions.num_ref"
            )
        return self


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> PipelineConfig:
    """Read the YAML file at `path` and apply `overrides` such as `policy.beta=0.1`.

    Raises ConfigError naming the key's path for anything unknown, missing or impossible.
    """
    try:
        raw = read_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected a mapping of sections (prompts, reference, ...), got {type(raw).__name__}"
        )
    try:
        return parse_config(apply_overrides(raw, overrides), where=str(path))
    except RecursionError:
        raise ConfigError(f"{path}: a value contains itself, through an alias: remove the alias") from None


def parse_config(raw: Mapping[str, Any], where: str = "configuration") -> PipelineConfig:
    """Validate a plain mapping; ConfigError lists every bad key with its path and the remedy.

    Types are strict, as in JSON: no text for a number, no number for a switch.
    """
    try:
        return PipelineConfig.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{where}: {error}") from None
        found = [dict(item) for item in error.errors() if item["type"] != "too_short" or item["input"] == []]
        lines = [_explain(item) for item in found]
        raise ConfigError(f"{where}: " + "\n  ".join(lines)) from None


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with each `dotted.key=value` set; values are read as YAML, list items by
    their index."""
    result: dict[str, Any] = _copy(raw)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override}: expected key.path=value, such as --set policy.beta=0.1")
        try:
            value = read_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--set {override}: the value is not valid YAML: {reason}") from None
        _assign(result, path.split("."), value, override)
    return result


def dump_config(config: PipelineConfig) -> str:
    """The whole configuration as YAML, defaults included, each key with what it means."""
    return "\n".join(_dump_section(config, indent=0)) + "\n"


def _explain(item: dict[str, Any]) -> str:
    steps = item["loc"]  # behind a list's index pydantic names the `kind` that it took the item for
    location = [
        str(step) for place, step in enumerate(steps) if not (place and isinstance(steps[place - 1], int))
    ]
    path = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(list(item["loc"])[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = (
            f"did you mean `{close[0]}`?"
            if close
            else f"known keys: {', '.join(sorted(known))}"
            if known
            else ""
        )
        return f"{path}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{path}: missing; this key has no default"
    if item["type"] == "union_tag_not_found":
        return f"{path}: `kind` is missing; set it, as in `kind: function`"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not path:
        return message
    got = f", got {item['input']!r}" if _may_be_shown(item) else ""
    remedy = "; write it in quotes" if item["type"] == "string_type" and got else ""
    return f"{path}: {message}{got}{remedy}"


def _may_be_shown(item: Mapping[str, Any]) -> bool:
    """Whether a refused value cannot be a secret: a number, or a word where the choices are known
    or a number is expected."""
    given = item["input"]
    word_expected = item["type"] == "literal_error" or re.match(r"(int|float|bool)_", item["type"])
    return (
        given is None or isinstance(given, (int, float)) or (isinstance(given, str) and bool(word_expected))
    )


def _known_keys(path: list[Any]) -> list[str]:
    models: list[Any] = [PipelineConfig]
    for place, step in enumerate(path):
        if isinstance(step, int):
            continue
        if place and isinstance(path[place - 1], int):
            models = [model for model in models if model.model_fields["kind"].default == step]
        else:
            models = [
                inner
                for model in models
                if step in model.model_fields
                for inner in _models_in(model.model_fields[step].annotation)
            ]
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found


def _copy(value: Any) -> Any:
    """A copy in which no two places share a mapping, as YAML's aliases do."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _assign(target: Any, path: list[str], value: Any, override: str) -> None:
    for depth, step in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(target, list):
            if not step.isdigit() or int(step) >= len(target):
                raise ConfigError(
                    f"--set {override}: `{'.'.join(path[:depth])}` is a list of {len(target)}; use an index"
                )
            key: Any = int(step)
        elif isinstance(target, dict):
            key = step
        else:
            raise ConfigError(f"--set {override}: `{'.'.join(path[:depth])}` is not a section")
        if last:
            target[key] = value
        else:
            if isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
            target = target[key]


def _dump_section(section: BaseModel, indent: int) -> list[str]:
    lines = []
    pad = "  " * indent
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        kind = "(execution option) " if is_execution_option(type(section), name) else ""
        comment = f"  # {kind}{' '.join(field.description.split())}" if field.description else ""
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:{comment}", *_dump_section(value, indent + 1)]
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            lines.append(f"{pad}{name}:{comment}")
            for item in value:
                first, *rest = _dump_section(item, indent + 2)
                lines += [f"{pad}  - {first.lstrip()}", *rest]
        else:
            plain = section.model_dump(mode="json", include={name})[name]
            text = write_yaml(plain, default_flow_style=True, width=10_000)
            value_text = text.strip().removesuffix("...").strip()
            lines.append(f"{pad}{name}: {value_text}{comment}")
    for name, value in (section.model_extra or {}).items():
        text = write_yaml({name: value}, default_flow_style=True, width=10_000)
        lines.append(f"{pad}{text.strip()[1:-1]}")
    return lines


def _add_sections() -> None:
    """Give every stage whose section is not declared above a section of its name."""
    for stage in STAGES.values():
        if stage.section is not None and stage.name not in PipelineConfig.model_fields:
            declared = FieldInfo.from_annotated_attribute(stage.section, stage.section())
            PipelineConfig.__pydantic_fields__[stage.name] = declared
            PipelineConfig.model_rebuild(force=True)


_add_sections()
