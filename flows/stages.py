"""One flow for every stage: the same cache and the same result whether it is run alone, by a schedule, or in the pipeline."""

from typing import Annotated, Literal

from prefect import flow, tags
from pydantic import Field

from tasks.config import PipelineConfig
from tasks.publish import publish_stage
from tasks.run_stage import StageResult, run_stage

__all__ = [
    "DEFAULT_STORE",
    "STAGE_FLOWS",
    "ConfigParameter",
    "StageName",
    "StoreParameter",
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
# titles and descriptions are what the form in Prefect's UI shows
ConfigParameter = Annotated[
    PipelineConfig,
    Field(
        title="Configuration",
        description="Everything that decides what is computed: the YAML file as a form.",
    ),
]
StoreParameter = Annotated[
    str,
    Field(
        title="Store",
        description="Where artifacts are kept: a folder of the worker's machine, or an fsspec URL such as s3://bucket/qrpo.",
    ),
]
ForceParameter = Annotated[
    bool, Field(title="Compute again", description="Compute every part again, even those that the store has.")
]


@flow(name="prompts", flow_run_name="{config.name}: prompts ({config.subject})")
def prompts(
    config: ConfigParameter, store: StoreParameter = DEFAULT_STORE, force: ForceParameter = False
) -> StageResult:
    """Read the prompts x, hold some out for evaluation, and cut the rest into parts."""
    return _run("prompts", config, store, force)


@flow(name="reference", flow_run_name="{config.name}: reference ({config.subject})")
def reference(
    config: ConfigParameter, store: StoreParameter = DEFAULT_STORE, force: ForceParameter = False
) -> StageResult:
    """Make the reference policy by fine-tuning on the chosen completions, where the configuration asks for it."""
    return _run("reference", config, store, force)


@flow(name="completions", flow_run_name="{config.name}: completions ({config.subject})")
def completions(
    config: ConfigParameter, store: StoreParameter = DEFAULT_STORE, force: ForceParameter = False
) -> StageResult:
    """Sample y_1 .. y_n from the reference policy for every prompt."""
    return _run("completions", config, store, force)


@flow(name="rewards", flow_run_name="{config.name}: rewards ({config.subject})")
def rewards(
    config: ConfigParameter, store: StoreParameter = DEFAULT_STORE, force: ForceParameter = False
) -> StageResult:
    """Score every completion: r(x, y)."""
    return _run("rewards", config, store, force)


@flow(name="quantiles", flow_run_name="{config.name}: quantiles ({config.subject})")
def quantiles(
    config: ConfigParameter, store: StoreParameter = DEFAULT_STORE, force: ForceParameter = False
) -> StageResult:
    """Turn the rewards of training completions into their quantiles among the reference rewards of the same prompt."""
    return _run("quantiles", config, store, force)


@flow(name="shards", flow_run_name="{config.name}: shards ({config.subject})")
def shards(
    config: ConfigParameter, store: StoreParameter = DEFAULT_STORE, force: ForceParameter = False
) -> StageResult:
    """Write the training rows: tokens, quantile rewards and reference log-probabilities."""
    return _run("shards", config, store, force)


@flow(name="policy", flow_run_name="{config.name}: policy ({config.subject})")
def policy(
    config: ConfigParameter, store: StoreParameter = DEFAULT_STORE, force: ForceParameter = False
) -> StageResult:
    """Fit the policy by regression: (f(q) - beta log Z - beta log(policy / reference))^2."""
    return _run("policy", config, store, force)


@flow(name="evaluation", flow_run_name="{config.name}: evaluation ({config.subject})")
def evaluation(
    config: ConfigParameter, store: StoreParameter = DEFAULT_STORE, force: ForceParameter = False
) -> StageResult:
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
