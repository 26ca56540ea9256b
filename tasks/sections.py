"""Configuration sections that belong to no stage: how the work is run, rounds, and comparisons."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qrpo.config import Section, Seed, execution_option


class RunConfig(Section):
    """How the work is cut and when a run gives up. Nothing here changes a number."""

    part_size: int = execution_option(256, ge=1)
    """Prompts in one part, the unit of caching and commit."""
    parts_per_task: int = execution_option(32, ge=1)
    """Parts that one Prefect task covers."""
    runner: Literal["local", "process", "dask", "ray"] = execution_option("local")
    """Where tasks run: one after another in this process, or spread over the workers of a process
    pool, Dask or Ray."""
    workers: int | None = execution_option(None, ge=1)
    """Workers, each with its own engine; by default as many as the GPUs allow, without GPUs one for
    each core."""
    gpus_per_worker: int | None = execution_option(None, ge=0)
    """GPUs of one worker; by default what its stage needs: the engine's, the largest reward
    model's, or one per training process."""
    cluster: str | None = execution_option(None)
    """Address of a Dask or Ray cluster that runs already (tcp://HOST:8786, ray://HOST:10001); by
    default each stage starts one on this machine and ends it."""
    cpu_threads: int | None = execution_option(None, ge=1)
    """Threads of training and scoring on a CPU; by default all cores, though a very small model is
    faster on one."""
    task_timeout: float | None = execution_option(None, gt=0.0)
    """Longest time for one task, in seconds. The engine of a slower one is killed and started
    again; committed parts stay."""
    lease_ttl: float = execution_option(60.0, gt=0.0)
    """Seconds of silence after which another run on the same store takes over what this one was
    working on."""
    lease_patience: float = execution_option(86_400.0, gt=0.0, allow_inf_nan=True)
    """Longest wait, in seconds, for a part that another run works on."""
    max_reject_fraction: float = execution_option(0.1, ge=0.0, le=1.0)
    """A stage that loses more than this share of its rows stops the run."""

    @model_validator(mode="after")
    def _cluster_of_a_kind(self) -> "RunConfig":
        if self.cluster is not None and self.runner not in ("dask", "ray"):
            raise ValueError(f"cluster is {self.cluster!r}: set runner to dask or ray, got {self.runner!r}")
        return self


class RoundsConfig(Section):
    """Training in rounds, each on fresh samples of the policy of the round before."""

    count: int = Field(1, ge=1, json_schema_extra={"fingerprint": False})
    """Rounds in all; the first trains on the completions that `quantiles.train_on` names."""
    num_completions: int = Field(4, ge=1)
    """Samples of the policy for each training prompt of a later round."""
    learning_rate: float | None = Field(None, gt=0, json_schema_extra={"fingerprint": False})
    """Peak learning rate of the later rounds, whose policies are near where they should be; null
    for `policy.learning_rate`. A smaller one than the first round's: at the same, a short round can
    move a policy away from the optimum."""
    from_run: str | None = Field(None, json_schema_extra={"fingerprint": False})
    """The run whose policy is sampled from and trained on; set by the rounds themselves, or by hand
    to go on from any run."""


class CompareConfig(Section):
    """Methods to compare with each other from the same samples and rewards."""

    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> settings by dotted key; a list is tried value by value:
    `dpo: {policy.loss: dpo, policy.beta: [0.1, 0.3]}`."""
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    """Training seeds of every setting."""
    select_by: Literal["reward", "quantile_reward", "win_rate"] = "reward"
    """Each method's best setting is the one with the highest mean of this on one half of the
    held-out prompts."""

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed is given twice in {list(seeds)}: a run counted twice adds no evidence")
        return seeds

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
