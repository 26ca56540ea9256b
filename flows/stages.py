"""One flow for every stage: the same cache and the same result whether it is run alone, by a
schedule, or in the pipeline."""

from typing import TYPE_CHECKING, Any, Literal

from prefect import Flow, flow

from tasks.config import PipelineConfig
from tasks.publish import publish_stage
from tasks.retries import NO_RESULT
from tasks.run_stage import StageResult, run_stage
from tasks.stage import Stage
from tasks.stages import STAGE_NAMES, STAGES

__all__ = ["DEFAULT_STORE", "STAGE_FLOWS", "StageName"]

DEFAULT_STORE = "artifacts"

if TYPE_CHECKING:
    StageName = str
else:
    StageName = Literal[STAGE_NAMES]  # choices in the form of Prefect's UI


def _flow_of(stage: Stage[Any]) -> Flow[Any, StageResult]:
    def run(config: PipelineConfig, store: str = DEFAULT_STORE, force: bool = False) -> StageResult:
        result = run_stage(stage.name, config, store, force=force)
        publish_stage(result, config, store)
        return result

    run.__name__ = run.__qualname__ = stage.name
    # Prefect's UI shows these next to the fields of its form
    run.__doc__ = f"""{stage.summary}

    Args:
        config: Everything that decides what is computed: the YAML file as a form.
        store: Where artifacts are kept: a folder of the worker's machine, or a URL such as s3://bucket/qrpo.
        force: Compute every part again, even those that the store has.
    """
    named = flow(
        name=stage.name,
        description=stage.summary,
        flow_run_name="{config.name}: " + stage.name + " ({config.subject})",
        **NO_RESULT,
    )
    return named(run)


STAGE_FLOWS = {name: _flow_of(stage) for name, stage in STAGES.items()}
"""Every stage's flow, in order. Each is also an attribute of this module, for entry points of
deployments."""
globals().update(STAGE_FLOWS)
