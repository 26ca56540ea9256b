"""What the server itself does about runs that go wrong, whether or not the process of the run still lives.

A run sends a heartbeat every 30 seconds. One that fell silent (machine lost, worker and run killed) would stay "Running" for
ever and keep its place in the queue: after 90 seconds it is marked as crashed. Failed and crashed runs are told of by a
notification block (Slack, e-mail, a webhook, ...), which is made once in the UI and named here.
"""

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from qrpo.errors import ConfigError

__all__ = ["find_dead_runs", "tell_of_failures"]

SILENCE = timedelta(seconds=90)
_ENDS = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled", "Paused", "Suspended")
_RUNS = {"prefect.resource.id": "prefect.flow-run.*"}


def find_dead_runs(client: SyncPrefectClient) -> str:
    """Make the automation that marks silent runs as crashed; its name."""
    heartbeat = "prefect.flow-run.heartbeat"
    trigger = EventTrigger(
        match=_RUNS,
        after={heartbeat},
        expect={heartbeat, *(f"prefect.flow-run.{state}" for state in _ENDS)},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    message = (
        f"No sign of life for {SILENCE.seconds} seconds: the process or its machine is gone. "
        "What was committed is kept; run it again and it goes on from there."
    )
    return _make(
        client,
        "QRPO: silent runs have crashed",
        f"A run without heartbeat for {SILENCE.seconds} s gives its place in the queue back.",
        trigger,
        ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message),
    )


def tell_of_failures(client: SyncPrefectClient, block: str) -> str:
    """Make the automation that notifies by the block `type/name`, such as `slack-webhook/alerts`; its name.

    Raises ConfigError where there is no such block.
    """
    kind, slash, name = block.partition("/")
    try:
        document = client.read_block_document_by_name(name if slash else block, kind)
    except ObjectNotFound:
        raise ConfigError(
            f"--notify {block}: no such block on the server. Make one in the UI (Blocks, Add Block, for instance Slack "
            "Webhook), and name it as type/name: slack-webhook/alerts"
        ) from None
    trigger = EventTrigger(
        match=_RUNS,
        match_related={"prefect.resource.role": "deployment"},  # not every subflow of a failed pipeline, too
        expect={"prefect.flow-run.Failed", "prefect.flow-run.TimedOut", "prefect.flow-run.Crashed"},
        posture=Posture.Reactive,
        threshold=1,
    )
    return _make(
        client,
        "QRPO: tell of failures",
        f"Failed and crashed runs of deployments are told by {block}.",
        trigger,
        SendNotification(
            block_document_id=document.id,
            subject="QRPO: {{ flow_run.name }} {{ flow_run.state.name }}",
            body="{{ flow_run.name }}: {{ flow_run.state.name }}\n{{ flow_run.state.message }}\n{{ flow_run|ui_url or '' }}",
        ),
    )


def _make(
    client: SyncPrefectClient, name: str, description: str, trigger: EventTrigger, action: ActionTypes
) -> str:
    automation = AutomationCore(name=name, description=description, trigger=trigger, actions=[action])
    for found in client.read_automations_by_name(name):
        client.update_automation(found.id, automation)
        return name
    client.create_automation(automation)
    return name
