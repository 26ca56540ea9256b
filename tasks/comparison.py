"""What `qrpo compare` trains: methods, each over a small grid of settings and several seeds."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from qrpo.config import Section

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["Candidate", "CompareConfig", "candidates"]


class CompareConfig(Section):
    """Methods to compare with each other from the same samples and rewards."""

    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> settings by dotted key; a list is tried value by value: `dpo: {policy.loss: dpo, policy.beta: [0.1, 0.3]}`."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Training seeds of every setting."""
    select_by: Literal["reward", "quantile_reward", "win_rate"] = "reward"
    """Each method's best setting is the one with the highest mean of this on one half of the held-out prompts."""

    @field_validator("methods")
    @classmethod
    def _usable(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in methods.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}", name):
                raise ValueError(f"{name!r} cannot name a method: use letters, digits, dashes, underscores")
            taken = [
                key for key in settings if key == "name" or key.partition(".")[0] in ("compare", "evaluation")
            ]
            if taken or not settings:
                raise ValueError(
                    f"{name}: {', '.join(taken) or 'no setting'}; a method sets what is trained, such as policy.loss and "
                    "policy.beta, and all methods share the name, the comparison and the evaluation"
                )
        return methods


@dataclass(frozen=True)
class Candidate:
    """One training run of a comparison."""

    method: str
    settings: dict[str, Any]
    """The point of the method's grid, by dotted key."""
    seed: int
    config: "PipelineConfig"


def candidates(config: "PipelineConfig") -> Iterator[Candidate]:
    """Every method, point of its grid and seed; raises ConfigError where a setting is unknown or impossible."""
    from tasks.config import apply_overrides, parse_config

    raw = config.model_dump(mode="json", exclude={"compare"})
    for method, grid in config.compare.methods.items():
        axes = [value if isinstance(value, list) else [value] for value in grid.values()]
        for number, point in enumerate(itertools.product(*axes), start=1):
            settings = dict(zip(grid, point, strict=True))
            for seed in config.compare.seeds:
                name = f"{config.name}.{method}-{number}.seed-{seed}"
                overrides = {**settings, "policy.seed": seed, "name": name}
                changed = apply_overrides(
                    raw, [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
                )
                yield Candidate(
                    method, settings, seed, parse_config(changed, where=f"compare.methods.{method}")
                )
