"""One flow for every stage: the same cache and the same result whether it is run alone, by a schedule, or in the pipeline."""

from collections.abc import Callable
from typing import Literal, ParamSpec

from prefect import Flow, flow, tags

from tasks.config import PipelineConfig
from tasks.publish import publish_stage
from tasks.run_stage import StageResult, run_stage

__all__ = [
    "DEFAULT_STORE",
    "STAGE_FLOWS",
    "StageName",
    "completions",
    "evaluation",
    "policy",
    "prompts",
    "quantiles",
    "reference",
    "rewards",
    "shards",
]

DEFAULT_STORE = "artifacts"

StageName = Literal[
    "prompts", "reference", "completions", "rewards", "quantiles", "shards", "policy", "evaluation"
]

# Prefect's UI shows these beside the fields of its form
_PARAMETERS = """
    Args:
        config: Everything that decides what is computed: the YAML file as a form.
        store: Where artifacts are kept: a folder of the worker's machine, or a URL such as s3://bucket/qrpo.
        force: Compute every part again, even those that the store has.
    """
P = ParamSpec("P")


def _stage(function: Callable[P, StageResult]) -> Flow[P, StageResult]:
    """The flow of a stage, named as the stage."""
    name, summary = function.__name__, function.__doc__
    function.__doc__ = f"{summary}\n{_PARAMETERS}"
    return flow(
        name=name, description=summary, flow_run_name="{config.name}: " + name + " ({config.subject})"
    )(function)


@_stage
def prompts(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Read the prompts x, hold some out for evaluation, and cut the rest into parts."""
    return _run("prompts", config, store, force)


@_stage
def reference(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Make the reference policy by fine-tuning on the chosen completions, where the configuration asks for it."""
    return _run("reference", config, store, force)


@_stage
def completions(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Sample y_1 .. y_n from the reference policy for every prompt."""
    return _run("completions", config, store, force)


@_stage
def rewards(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Score every completion: r(x, y)."""
    return _run("rewards", config, store, force)


@_stage
def quantiles(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Turn the rewards of training completions into their quantiles among the reference rewards of the same prompt."""
    return _run("quantiles", config, store, force)


@_stage
def shards(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Write the training rows: tokens, quantile rewards and reference log-probabilities."""
    return _run("shards", config, store, force)


@_stage
def policy(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Fit the policy by regression: (f(q) - beta log Z - beta log(policy / reference))^2."""
    return _run("policy", config, store, force)


@_stage
def evaluation(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Compare fresh samples of policy and reference on the held-out prompts."""
    return _run("evaluation", config, store, force)


def _run(stage: StageName, config: PipelineConfig, store: str, force: bool) -> StageResult:
    with tags(f"run:{config.name}", f"stage:{stage}"):
        result = run_stage(stage, config, store, force=force)
        publish_stage(result, config, store)
    return result


STAGE_FLOWS = {
    stage.name: stage
    for stage in (prompts, reference, completions, rewards, quantiles, shards, policy, evaluation)
}
"""Every stage's flow, in order."""
