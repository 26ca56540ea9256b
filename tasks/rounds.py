"""Rounds: train on fresh samples of the policy itself, judged against the same reference rewards as ever.

A policy that has outgrown its reference finds little more in the reference's samples. So a later round draws training completions from
the policy of the round before, scores them, takes their quantiles among the reference rewards that the first round computed, and goes
on training that policy. Quantiles, log Z and log ratios stay relative to the one reference, hence so does the optimum that all
rounds approach. Each round is a run of its own, `NAME.round-2` and so on, with the cache of any other.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from qrpo.config import Section
from qrpo.errors import ConfigError
from storage import PartRecord, Store

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["RoundsConfig", "previous_policy", "round_configs", "rounds_until"]


class RoundsConfig(Section):
    """Training in rounds, each on fresh samples of the policy of the round before."""

    count: int = Field(1, ge=1, json_schema_extra={"fingerprint": False})
    """Rounds in all; the first trains on the completions that `quantiles.train_on` names."""
    num_completions: int = Field(4, ge=1)
    """Samples of the policy for each training prompt of a later round."""
    learning_rate: float | None = Field(None, gt=0, json_schema_extra={"fingerprint": False})
    """Peak learning rate of the later rounds, whose policies are near where they should be; null for `policy.learning_rate`. A
    smaller one than the first round's: at the same, a short round can move a policy away from the optimum."""
    from_run: str | None = Field(None, json_schema_extra={"fingerprint": False})
    """The run whose policy is sampled from and trained on; set by the rounds themselves, or by hand to go on from any run."""


def round_configs(config: "PipelineConfig") -> Iterator["PipelineConfig"]:
    """The configuration of every round, each a single one; the first is the given one's own."""
    single = config.rounds.model_copy(update={"count": 1})
    before = config.model_copy(update={"rounds": single})
    yield before
    rate = config.rounds.learning_rate
    policy = config.policy if rate is None else config.policy.model_copy(update={"learning_rate": rate})
    for number in range(2, config.rounds.count + 1):
        before = config.model_copy(
            update={
                "name": f"{config.name}.round-{number}",
                "rounds": single.model_copy(update={"from_run": before.name}),
                "quantiles": config.quantiles.model_copy(update={"train_on": "policy"}),
                "policy": policy,
            }
        )
        yield before


def rounds_until(last: str, config: "PipelineConfig") -> list["PipelineConfig"]:
    """The configurations of a run up to the stage `last`: of all rounds where it comes as far as a policy, else of the first."""
    rounds = list(round_configs(config))
    return rounds if last in ("policy", "evaluation") else rounds[:1]


def previous_policy(config: "PipelineConfig", store: Store) -> PartRecord | None:
    """The policy that this configuration goes on from; None where it is a first round. Raises ConfigError where it is not there."""
    name = config.rounds.from_run
    if name is None:
        return None
    noted = (store.run(name) or {}).get("stages", {}).get("policy")
    manifest = store.manifest("policy", noted["fingerprint"]) if noted else None
    if manifest is None:
        raise ConfigError(
            f"rounds.from_run: {store.url} has no policy of a run named {name!r}. Run it first, up to its policy"
        )
    return manifest.parts[0]
