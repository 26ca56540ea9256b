"""One flow for every stage: the same cache and the same result whether it is run alone, by a schedule, or in the pipeline."""

from prefect import flow

from tasks.config import PipelineConfig
from tasks.run_stage import StageResult, run_stage

__all__ = [
    "STAGE_FLOWS",
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


@flow(name="prompts", flow_run_name="prompts of {config.name}")
def prompts(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Read the prompts x, hold some out for evaluation, and cut the rest into parts."""
    return run_stage("prompts", config, store, force=force)


@flow(name="reference", flow_run_name="reference of {config.name}")
def reference(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Make the reference policy by fine-tuning on the chosen completions, where the configuration asks for it."""
    return run_stage("reference", config, store, force=force)


@flow(name="completions", flow_run_name="completions of {config.name}")
def completions(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Sample y_1 .. y_n from the reference policy for every prompt."""
    return run_stage("completions", config, store, force=force)


@flow(name="rewards", flow_run_name="rewards of {config.name}")
def rewards(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Score every completion: r(x, y)."""
    return run_stage("rewards", config, store, force=force)


@flow(name="quantiles", flow_run_name="quantiles of {config.name}")
def quantiles(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Turn the rewards of training completions into their quantiles among the reference rewards of the same prompt."""
    return run_stage("quantiles", config, store, force=force)


@flow(name="shards", flow_run_name="shards of {config.name}")
def shards(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Write the training rows: tokens, quantile rewards and reference log-probabilities."""
    return run_stage("shards", config, store, force=force)


@flow(name="policy", flow_run_name="policy of {config.name}")
def policy(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Fit the policy by regression: (f(q) - beta log Z - beta log(policy / reference))^2."""
    return run_stage("policy", config, store, force=force)


@flow(name="evaluation", flow_run_name="evaluation of {config.name}")
def evaluation(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
    """Compare fresh samples of policy and reference on the held-out prompts."""
    return run_stage("evaluation", config, store, force=force)


STAGE_FLOWS = {
    stage.name: stage
    for stage in (prompts, reference, completions, rewards, quantiles, shards, policy, evaluation)
}
"""Every stage's flow, in order."""
