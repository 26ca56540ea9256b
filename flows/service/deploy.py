"""`qrpo deploy`: the deployments of `deployments/prefect.yaml` on a Prefect server, with a configuration filled in.

Prefect's own `prefect deploy` does the work. What is added: the work pool and its queues (`deployments/pools.yaml`), the
configuration and the store as default parameters of every deployment, its image and secrets, the schedule, and the automations.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.service.automations import find_dead_runs, tell_of_failures
from qrpo.errors import ConfigError, EngineError
from storage import Store
from tasks.config import PipelineConfig

__all__ = ["DeployOptions", "PoolType", "deploy", "deployed_lines", "job_template", "pool_type_of"]

PoolType = Literal["process", "docker", "kubernetes"]

_FOLDER = Path(__file__).parents[2] / "deployments"
_FOLDER_IN_CONTAINERS = "/work"


@dataclass(frozen=True)
class DeployOptions:
    """How the deployments run; see the help of `qrpo deploy`."""

    pool: str = "qrpo"
    pool_type: PoolType = "process"
    cron: str | None = None
    timezone: str = "UTC"
    gpus: int = 1
    image: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    notify: str | None = None


def deploy(config: PipelineConfig, store_url: str, options: DeployOptions) -> dict[str, Any]:
    """Deploy every flow to the server that PREFECT_API_URL names; what was deployed, for people and machines.

    Deploying again changes what is there. Raises ConfigError for a schedule, store or block that cannot be used, EngineError
    where the server does not answer or Prefect refuses.
    """
    store = Store(store_url).url
    if options.pool_type == "process" and options.image is not None:
        raise ConfigError(
            f"--image {options.image}: a process has none; it is for --type docker and kubernetes"
        )
    if options.pool_type != "process" and "://" not in store:
        raise ConfigError(
            f"store: {store} is a folder of this machine, which a {options.pool_type} job does not see: "
            "name an object store, such as --store s3://bucket/qrpo"
        )
    _check_cron(options)
    try:
        with get_client(sync_client=True) as client:
            _check_secrets(client, options)
            _make_pool(client, options)
            names = _prefect_deploy(options)
            parameters = {"config": config.model_dump(mode="json"), "store": store}
            for name in names:
                found = client.read_deployment_by_name(name)
                # the secrets not in the file: `prefect deploy` would replace the references by their values
                jobs = _merged(found.job_variables, _job_variables(options))
                client.update_deployment(
                    found.id, DeploymentUpdate(parameters=parameters, job_variables=jobs)
                )
                # only now: the scheduler would make runs without parameters in between
                for schedule in client.read_deployment_schedules(found.id) if options.cron else ():
                    client.update_deployment_schedule(found.id, schedule.id, active=True)
            automations = [find_dead_runs(client)]
            if options.notify is not None:
                automations.append(tell_of_failures(client, options.notify))
    except httpx.HTTPError as error:
        raise EngineError(
            f"the Prefect server at {os.environ.get('PREFECT_API_URL', '(PREFECT_API_URL is not set)')} did not do it: "
            f"{error}. Start one (`prefect server start`, or `qrpo serve` for all in one), and set PREFECT_API_URL"
        ) from error
    return {
        "run": config.name,
        "store": store,
        "work_pool": options.pool,
        "deployments": names,
        "schedule": options.cron,
        "automations": automations,
    }


def deployed_lines(deployed: dict[str, Any]) -> list[str]:
    """What was deployed, as a person reads it."""
    schedule = deployed["schedule"]
    return [
        f"{len(deployed['deployments'])} deployments of run {deployed['run']} on work pool {deployed['work_pool']}, "
        + (f"the pipeline at {schedule}" if schedule else "no schedule"),
        *(f"  {name}" for name in deployed["deployments"]),
        *(f"automation: {name}" for name in deployed["automations"]),
        f"a worker takes the runs:  prefect worker start --pool {deployed['work_pool']}",
        f"start one by hand:  prefect deployment run {deployed['deployments'][0]}",
    ]


def pool_type_of(text: str) -> PoolType:
    """The type of work pool of that name; raises ConfigError."""
    for known in get_args(PoolType):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"--type {text}: expected {', '.join(get_args(PoolType))}")


def job_template(default: dict[str, Any], pool_type: PoolType) -> dict[str, Any]:
    """Prefect's default job template for this type of work pool, with the changes of `deployments/pools.yaml`."""
    changes = yaml.safe_load((_FOLDER / "pools.yaml").read_text(encoding="utf-8"))[pool_type]
    template: dict[str, Any] = _merged(default, {"job_configuration": changes.get("job_configuration", {})})
    properties = template["variables"]["properties"]
    for name, value in changes.get("defaults", {}).items():
        properties[name] = {**properties[name], "default": value}
    return template


def _default_template(client: SyncPrefectClient, pool_type: PoolType) -> dict[str, Any]:
    """The server's own template for new work pools of this type."""
    view = {"view": "aggregate-worker-metadata"}
    known = client.request("GET", "/collections/views/{view}", path_params=view).json()
    [template] = [
        worker["default_base_job_configuration"]
        for workers in known.values()
        for kind, worker in workers.items()
        if kind == pool_type
    ]
    return template  # type: ignore[no-any-return]


def _job_variables(options: DeployOptions) -> dict[str, Any]:
    """What the jobs of these deployments have beyond their pool's template; secrets as references, which a worker resolves."""
    references = {
        variable: "{{ prefect.blocks.secret." + block + " }}" for variable, block in options.secrets.items()
    }
    return {"env": references} | ({} if options.image is None else {"image": options.image})


def _check_secrets(client: SyncPrefectClient, options: DeployOptions) -> None:
    for variable, block in options.secrets.items():
        try:
            client.read_block_document_by_name(block, "secret", include_secrets=False)
        except ObjectNotFound:
            raise ConfigError(
                f"--secret {variable}={block}: no Secret block of this name on the server. Make it in the UI (Blocks, Add "
                f"Block, Secret)"
            ) from None


def _make_pool(client: SyncPrefectClient, options: DeployOptions) -> None:
    """The work pool with its queues; one that is there keeps its template, which may have been changed in the UI."""
    try:
        client.read_work_pool(options.pool)
    except ObjectNotFound:
        template = job_template(_default_template(client, options.pool_type), options.pool_type)
        pool = WorkPoolCreate(name=options.pool, type=options.pool_type, base_job_template=template)
        with suppress(ObjectAlreadyExists):  # a worker that starts makes it, too
            client.create_work_pool(pool)
    found_type = client.read_work_pool(options.pool).type
    if found_type != options.pool_type:
        raise ConfigError(
            f"work pool {options.pool!r} is there already, of type {found_type}, not {options.pool_type}: "
            "choose another name with --pool"
        )
    for queue, limit in (("gpu", options.gpus), ("cpu", None)):
        try:
            found = client.read_work_queue_by_name(queue, work_pool_name=options.pool)
        except ObjectNotFound:
            found = client.create_work_queue(queue, work_pool_name=options.pool)
        client.update_work_queue(found.id, concurrency_limit=limit)


def _prefect_deploy(options: DeployOptions) -> list[str]:
    """Run `prefect deploy` on the filled-in file; the deployments' full names."""
    rendered = yaml.safe_load((_FOLDER / "prefect.yaml").read_text(encoding="utf-8"))
    folder = str(Path.cwd()) if options.pool_type == "process" else _FOLDER_IN_CONTAINERS
    rendered["pull"] = [{"prefect.deployments.steps.set_working_directory": {"directory": folder}}]
    for deployment in rendered["deployments"]:
        deployment["work_pool"]["name"] = options.pool
        if options.cron is not None and "schedules" in deployment:
            deployment["schedules"] = [
                {"slug": "schedule", "cron": options.cron, "timezone": options.timezone, "active": False}
            ]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "prefect.yaml")
        file.write_text(yaml.safe_dump(rendered, sort_keys=False), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise EngineError(f"`prefect deploy` failed:\n{done.stdout}{done.stderr}")
    return [f"{entry['entrypoint'].rpartition('.')[2]}/{entry['name']}" for entry in rendered["deployments"]]


def _check_cron(options: DeployOptions) -> None:
    if options.cron is None:
        return
    try:
        CronSchedule(cron=options.cron, timezone=options.timezone)
    except ValueError as error:
        reason = " ".join(str(error).splitlines()[2:3]).strip() or str(error)
        raise ConfigError(
            f"--cron {options.cron!r}, --timezone {options.timezone!r}: {reason}. "
            "Expected five fields, such as '0 3 * * *' for every night at three, and a zone such as Europe/Zurich"
        ) from None


def _merged(base: Any, change: Any) -> Any:
    """`change` laid over `base`: mappings key by key, lists item by item."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{key: _merged(base.get(key), value) for key, value in change.items()}}
    if isinstance(base, list) and isinstance(change, list):
        return [
            _merged(base[place] if place < len(base) else None, item) for place, item in enumerate(change)
        ] + base[len(change) :]
    return change
