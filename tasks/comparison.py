"""What `qrpo compare` trains: methods, each over a small grid of settings and several seeds."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.config import PipelineConfig, apply_overrides, parse_config


@dataclass(frozen=True)
class Candidate:
    """One training run of a comparison."""

    method: str
    settings: dict[str, Any]
    """The point of the method's grid, by dotted key."""
    seed: int
    config: PipelineConfig


def candidates(config: PipelineConfig) -> Iterator[Candidate]:
    """Every method, point of its grid and seed; raises ConfigError where a setting is unknown or
    impossible."""
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
