"""`qrpo deploy`: create deployments of the pipeline and of every stage on a Prefect server.

`deployments/prefect.yaml` declares the deployment of the pipeline. The deployments of the stages
are derived from it and from the list of stages. All of them get the configuration and the store as
default parameters. `deployments/pools.yaml` declares what the work pools change in Prefect's own
job templates.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runner.storage import LocalStorage
from prefect.schedules import Schedule
from prefect.settings import PREFECT_API_URL
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type
from pydantic import ValidationError

from flows.service.automations import mark_silent_runs, notify_of_failures
from qrpo.errors import ConfigError, EngineError
from storage import Store
from tasks.config import PipelineConfig
from tasks.stages import STAGES

PoolType = Literal["process", "docker", "kubernetes"]

_FOLDER = Path(__file__).parents[2] / "deployments"
_FOLDER_IN_CONTAINERS = "/work"


@dataclass(frozen=True)
class DeployOptions:
    """How the deployments run. `qrpo deploy --help` describes each field; `secrets` maps variables
    to Secret blocks."""

    pool: str = "qrpo"
    pool_type: PoolType = "process"
    cron: str | None = None
    timezone: str = "UTC"
    gpus: int = 1
    image: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    notify: str | None = None


def deploy(config: PipelineConfig, store: Store, options: DeployOptions) -> dict[str, Any]:
    """Create or update every deployment on the server that PREFECT_API_URL names; return the object
    that `--json` prints.

    Deployments are named by the run, and get the schedule of `options` in place of all that they
    had. Raises ConfigError if a schedule, store or block cannot be used, EngineError if the server
    does not answer or refuses.
    """
    if PREFECT_API_URL.value() is None:
        raise ConfigError(
            "PREFECT_API_URL is not set, so there is no server to deploy to: set it to one that you started with "
            "`prefect server start`, or run `qrpo serve`, which starts one"
        )
    _check(options, store.url)
    parameters = {"config": config.model_dump(mode="json"), "store": store.url}
    try:
        with get_client(sync_client=True) as client:
            _check_secrets(client, options)
            create_pool(client, options)
            deployments = [_deployment(entry, config.name, parameters, options) for entry in declarations()]
            for deployment in deployments:
                _apply(client, deployment)
            automations = [mark_silent_runs(client)]
            if options.notify is not None:
                automations.append(notify_of_failures(client, options.notify))
    except (httpx.HTTPError, DeploymentApplyError) as error:
        raise EngineError(
            f"the request to the Prefect server at {PREFECT_API_URL.value()} failed: {error}. Check PREFECT_API_URL, and "
            "PREFECT_API_AUTH_STRING where the server wants a login; or run `qrpo serve`, which starts a server"
        ) from error
    return {
        "run": config.name,
        "store": store.url,
        "work_pool": options.pool,
        "deployments": [deployment.full_name for deployment in deployments],
        "schedule": options.cron,
        "automations": automations,
    }


def deployed_lines(deployed: dict[str, Any]) -> list[str]:
    """The result of `deploy` as text."""
    names, pool, schedule = deployed["deployments"], deployed["work_pool"], deployed["schedule"]
    when = f"pipeline scheduled at {schedule}" if schedule else "no schedule"
    return [
        f"{len(names)} deployments of run {deployed['run']} on work pool {pool}, {when}",
        *(f"  {name}" for name in names),
        *(f"automation: {name}" for name in deployed["automations"]),
        f"start a worker:  prefect worker start --pool {pool}",
        f"start a run:  prefect deployment run {names[0]}",
    ]


def declarations() -> Iterator[dict[str, Any]]:
    """Yield every deployment in the format of `prefect.yaml`: the pipeline as declared there, then
    one per stage."""
    [pipeline] = yaml.safe_load((_FOLDER / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    yield pipeline
    for name, stage in STAGES.items():
        yield pipeline | {
            "name": name,
            "entrypoint": f"flows.stages.{name}",
            "description": None,  # the flow's own
            "tags": ["qrpo", "gpu"] if stage.uses_gpu else ["qrpo"],
            "work_pool": pipeline["work_pool"] | {"work_queue_name": "gpu" if stage.uses_gpu else "cpu"},
            "schedules": [],
        }


def job_template(default: dict[str, Any], pool_type: PoolType) -> dict[str, Any]:
    """Prefect's default job template for this type of work pool, with the changes of
    `deployments/pools.yaml`."""
    changes = yaml.safe_load((_FOLDER / "pools.yaml").read_text(encoding="utf-8"))[pool_type]
    template: dict[str, Any] = _merged(default, {"job_configuration": changes.get("job_configuration", {})})
    properties = template["variables"]["properties"]
    for name, value in changes.get("defaults", {}).items():
        properties[name] = {**properties[name], "default": value}
    return template


def _apply(client: SyncPrefectClient, deployment: RunnerDeployment) -> None:
    with suppress(ObjectNotFound):  # an update keeps the schedules that it does not name
        found = client.read_deployment_by_name(deployment.full_name)
        for schedule in found.schedules:
            client.delete_deployment_schedule(found.id, schedule.id)
    deployment.apply()


def _deployment(
    entry: dict[str, Any], run: str, parameters: dict[str, Any], options: DeployOptions
) -> RunnerDeployment:
    """A declaration as Prefect's object, with the options filled in."""
    # references, which the worker resolves: the values of the secrets stay in their blocks
    secrets = {name: "{{ prefect.blocks.secret." + block + " }}" for name, block in options.secrets.items()}
    variables = entry["work_pool"]["job_variables"]
    variables = variables | {"env": variables["env"] | secrets}
    if options.image is not None:
        variables["image"] = options.image
    when = {"cron": options.cron, "timezone": options.timezone, "active": True}
    deployment = RunnerDeployment.from_entrypoint(
        entry["entrypoint"],
        name=run,
        description=entry["description"],
        tags=entry["tags"],
        parameters=parameters,
        schedules=[Schedule(**{**schedule, **when}) for schedule in entry["schedules"] if options.cron],
        concurrency_limit=ConcurrencyLimitConfig(**entry["concurrency_limit"]),
        work_pool_name=options.pool,
        work_queue_name=entry["work_pool"]["work_queue_name"],
        job_variables=variables,
    )
    folder = str(Path.cwd()) if options.pool_type == "process" else _FOLDER_IN_CONTAINERS
    deployment.storage = LocalStorage(folder)
    return deployment


def _check(options: DeployOptions, store: str) -> None:
    """Raise ConfigError for options that contradict each other or cannot be used."""
    if options.pool_type == "process" and options.image is not None:
        raise ConfigError(f"--image {options.image}: only --type docker and --type kubernetes use an image")
    if options.pool_type != "process" and "://" not in store:
        raise ConfigError(
            f"store: {store} is a folder of this machine, which a {options.pool_type} job cannot see. "
            "Name an object store, such as --store s3://bucket/qrpo"
        )
    if options.cron is None:
        return
    try:
        CronSchedule(cron=options.cron, timezone=options.timezone)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"--cron {options.cron!r}, --timezone {options.timezone!r}: {reason}. "
            "Expected five fields, such as '0 3 * * *' for every night at 3:00, and a zone such as Europe/Zurich"
        ) from None


def _check_secrets(client: SyncPrefectClient, options: DeployOptions) -> None:
    for variable, block in options.secrets.items():
        try:
            client.read_block_document_by_name(block, "secret", include_secrets=False)
        except ObjectNotFound:
            raise ConfigError(
                f"--secret {variable}={block}: the server has no Secret block of this name. Create it in the UI "
                "(Blocks, Add Block, Secret)"
            ) from None


def create_pool(client: SyncPrefectClient, options: DeployOptions) -> None:
    """Create the work pool and its queues. An existing pool keeps its template, which may have been
    changed in the UI."""
    try:
        client.read_work_pool(options.pool)
    except ObjectNotFound:
        default = asyncio.run(get_default_base_job_template_for_infrastructure_type(options.pool_type))
        assert default is not None, f"Prefect knows no work pool of type {options.pool_type}"
        template = job_template(default, options.pool_type)
        pool = WorkPoolCreate(name=options.pool, type=options.pool_type, base_job_template=template)
        with suppress(ObjectAlreadyExists):  # a worker that starts at this moment also creates it
            client.create_work_pool(pool)
    found_type = client.read_work_pool(options.pool).type
    if found_type != options.pool_type:
        raise ConfigError(
            f"work pool {options.pool!r} already exists with type {found_type}, not {options.pool_type}: "
            "choose another name with --pool"
        )
    for queue, limit in (("gpu", options.gpus), ("cpu", None)):
        try:
            found = client.read_work_queue_by_name(queue, work_pool_name=options.pool)
        except ObjectNotFound:
            found = client.create_work_queue(queue, work_pool_name=options.pool)
        client.update_work_queue(found.id, concurrency_limit=limit)


def _merged(base: Any, change: Any) -> Any:
    """`base` with `change` applied: mappings key by key, lists item by item."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{key: _merged(base.get(key), value) for key, value in change.items()}}
    if isinstance(base, list) and isinstance(change, list):
        missing: list[Any] = [None] * (len(change) - len(base))
        return [_merged(*pair) for pair in zip([*base, *missing], change, strict=False)] + base[len(change) :]
    return change
