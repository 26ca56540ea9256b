"""All stages as one flow."""

from prefect import flow

from flows.service.flow_runs import call_flow, report_ends
from flows.stages import DEFAULT_STORE, STAGE_FLOWS, StageName
from tasks.config import PipelineConfig
from tasks.planner import Planner, planner_of, planning
from tasks.preflight import require_preflight
from tasks.retries import NO_RESULT
from tasks.rounds import rounds_until
from tasks.run_stage import StageResult
from tasks.stages import STAGE_NAMES, STAGES


@flow(name="pipeline", flow_run_name="{config.name}: {first} to {last} ({config.subject})", **NO_RESULT)
def pipeline(
    config: PipelineConfig,
    store: str = DEFAULT_STORE,
    first: StageName = "prompts",
    last: StageName = "evaluation",
    force: tuple[StageName, ...] = (),
) -> list[StageResult]:
    """Quantile Reward Policy Optimization, stage by stage; what the store already has is not
    computed again.

    for every prompt x                                                        prompts
        y_1 .. y_n ~ reference(. | x)                                         completions
        r_i = reward(x, y_i)                                                  rewards
        q(y) = share of r_1 .. r_n that are at most r(x, y)                   quantiles
        log reference(y | x)                                                  shards
    minimise (f(q) - beta log Z - beta log(policy / reference))^2             policy
    compare policy and reference on held-out prompts                          evaluation

    With `rounds.count`, again from y ~ policy(. | x), against the same r_1 .. r_n. Returns the
    results of the last round.

    Args:
        config: Everything that decides what is computed: the YAML file as a form.
        store: Where artifacts are kept: a folder of the worker's machine, or a URL such as s3://bucket/qrpo.
        first: Start with this stage; those before must be complete.
        last: Stop after this stage.
        force: Stages to compute again even where the store has them.
    """
    results: dict[str, StageResult] = {}
    planner: Planner | None = None
    for number, of_round in enumerate(rounds_until(last, config)):
        results = {}
        planner = planner.following(of_round) if planner else planner_of(of_round, store, first)
        require_preflight(planner, stage_span(first if number == 0 else "prompts", last))
        with planning(planner):
            for stage in stage_span(first if number == 0 else "prompts", last):
                parents = [results[parent] for parent in STAGES[stage].parents if parent in results]
                results[stage] = call_flow(
                    STAGE_FLOWS[stage], of_round, store, stage in force, wait_for=parents
                )
    report_ends(patience=0.0)
    return list(results.values())


def stage_span(first: StageName = "prompts", last: StageName = "evaluation") -> tuple[StageName, ...]:
    """The stages from `first` to `last`, both included."""
    return STAGE_NAMES[STAGE_NAMES.index(first) : STAGE_NAMES.index(last) + 1]
