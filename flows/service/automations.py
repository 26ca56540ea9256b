"""Prefect automations: the server acts on failed runs even if the process of the run is gone.

A run sends a heartbeat every 30 seconds. If its machine is lost, the run would stay "Running"
without end and keep its place in the queue, so the server marks it as crashed after 90 seconds of
silence. A notification block (Slack, e-mail, a webhook, ...), which you create once in the UI, can
announce failed and crashed runs.
"""

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from qrpo.errors import ConfigError

_SILENCE = timedelta(seconds=90)
_HEARTBEAT = "prefect.flow-run.heartbeat"
_FINAL_STATES = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled", "Paused", "Suspended")
_RUNS = {"prefect.resource.id": "prefect.flow-run.*"}


def mark_silent_runs(client: SyncPrefectClient) -> str:
    """Create or update the automation that marks silent runs as crashed; return its name."""
    trigger = EventTrigger(
        match=_RUNS,
        after={_HEARTBEAT},
        expect={_HEARTBEAT, *(f"prefect.flow-run.{state}" for state in _FINAL_STATES)},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=_SILENCE,
    )
    message = (
        f"No heartbeat for {_SILENCE.seconds} seconds: the process or its machine is gone. "
        "Committed parts are kept, and the next run continues from them."
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)
    description = f"A run without a heartbeat for {_SILENCE.seconds} s frees its place in the queue."
    return _save(client, "QRPO: silent runs have crashed", description, trigger, action)


def notify_of_failures(client: SyncPrefectClient, block: str) -> str:
    """Create or update the automation that notifies through `block` (type/name); return its name.

    Raises ConfigError if the server has no such block.
    """
    kind, slash, name = block.partition("/")
    try:
        document = client.read_block_document_by_name(name if slash else block, kind)
    except ObjectNotFound:
        raise ConfigError(
            f"--notify {block}: no such block on the server. Create one in the UI (Blocks, Add Block, for instance Slack "
            "Webhook) and name it as type/name: slack-webhook/alerts"
        ) from None
    trigger = EventTrigger(
        match=_RUNS,
        match_related={"prefect.resource.role": "deployment"},  # not the subflows of a failed pipeline
        expect={"prefect.flow-run.Failed", "prefect.flow-run.TimedOut", "prefect.flow-run.Crashed"},
        posture=Posture.Reactive,
        threshold=1,
    )
    action = SendNotification(
        block_document_id=document.id,
        subject="QRPO: {{ flow_run.name }} {{ flow_run.state.name }}",
        body="{{ flow_run.name }}: {{ flow_run.state.name }}\n{{ flow_run.state.message }}\n{{ flow_run|ui_url or '' }}",
    )
    description = f"{block} announces failed and crashed runs of deployments."
    return _save(client, "QRPO: tell of failures", description, trigger, action)


def _save(
    client: SyncPrefectClient, name: str, description: str, trigger: EventTrigger, action: ActionTypes
) -> str:
    automation = AutomationCore(name=name, description=description, trigger=trigger, actions=[action])
    if found := client.read_automations_by_name(name):
        client.update_automation(found[0].id, automation)
    else:
        client.create_automation(automation)
    return name
