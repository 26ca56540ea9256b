"""All stages as one flow."""

from prefect import flow

from flows.stages import DEFAULT_STORE, STAGE_FLOWS
from tasks.config import PipelineConfig
from tasks.run_stage import StageResult

__all__ = ["pipeline", "stage_span"]


@flow(name="pipeline", flow_run_name="{config.name}")
def pipeline(
    config: PipelineConfig,
    store: str = DEFAULT_STORE,
    first: str = "prompts",
    last: str = "evaluation",
    force: tuple[str, ...] = (),
) -> list[StageResult]:
    """Quantile Reward Policy Optimization, stage by stage; what the store already has is not computed again.

    for every prompt x                                                        prompts
        y_1 .. y_n ~ reference(. | x)                                         completions
        r_i = reward(x, y_i)                                                  rewards
        q(y) = share of r_1 .. r_n that are at most r(x, y)                   quantiles
        log reference(y | x)                                                  shards
    minimise (f(q) - beta log Z - beta log(policy / reference))^2             policy
    compare policy and reference on held-out prompts                          evaluation
    """
    return [STAGE_FLOWS[stage](config, store, force=stage in force) for stage in stage_span(first, last)]


def stage_span(first: str = "prompts", last: str = "evaluation") -> tuple[str, ...]:
    """The stages from `first` to `last`, both included."""
    names = tuple(STAGE_FLOWS)
    return names[names.index(first) : names.index(last) + 1]
