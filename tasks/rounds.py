"""Rounds: train on fresh samples of the policy itself, judged against the same reference rewards.

A policy that has outgrown its reference finds little more in the reference's samples. So a later
round draws training completions from the policy of the round before, scores them, takes their
quantiles among the reference rewards that the first round computed, and goes on training that
policy. Quantiles, log Z and log ratios stay relative to the one reference, hence so does the
optimum that all rounds approach. Each round is a separate run, `NAME.round-2` and so on.
"""

from collections.abc import Iterator

from tasks.config import PipelineConfig


def round_configs(config: PipelineConfig) -> Iterator[PipelineConfig]:
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


def rounds_until(last: str, config: PipelineConfig) -> list[PipelineConfig]:
    """The configurations of a run up to the stage `last`: of all rounds where it comes as far as a
    policy, else of the first."""
    rounds = list(round_configs(config))
    return rounds if last in ("policy", "evaluation") else rounds[:1]
