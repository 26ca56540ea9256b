"""What `qrpo deploy` declares: the list of deployments, and the job that the worker class of each kind of pool makes of it."""

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Pending
from prefect.types._datetime import now

from flows.service.deploy import DeployOptions, PoolType, create_pool, declarations, deploy, job_template
from flows.service.pool_runs import changes, end_runs
from storage import Store
from tasks.config import load_config
from tasks.stages import STAGES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

FLOW_RUN = "tiny: prompts to evaluation (prompts.jsonl, base)"


def job_of(kind: PoolType, worker: Any, **more: str) -> Any:
    """What a worker makes of the pool's template and a deployment's job variables."""
    template = job_template(worker.get_default_base_job_template(), kind)
    variables = next(declarations())["work_pool"]["job_variables"]
    job = asyncio.run(worker.job_configuration.from_template_and_values(template, {**variables, **more}))
    job.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name=FLOW_RUN))
    return job


def test_process_job_has_the_environment() -> None:
    from prefect.workers.process import ProcessWorker

    job = job_of("process", ProcessWorker)

    assert job.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert job.env["DO_NOT_TRACK"] == "1"


def test_docker_container_has_image_network_gpus_and_shared_memory() -> None:
    worker = pytest.importorskip("prefect_docker.worker").DockerWorker
    types = pytest.importorskip("docker.types")

    job = job_of("docker", worker, image="registry/qrpo:1")

    assert job.image == "registry/qrpo:1"
    assert job.networks == ["qrpo"]
    assert job.volumes == ["qrpo-models:/root/.cache/huggingface"]
    assert job.auto_remove
    assert job.env["DO_NOT_TRACK"] == "1"
    host = types.HostConfig(version="1.43", **job.container_create_kwargs)
    assert host["IpcMode"] == "host"
    [gpus] = host["DeviceRequests"]
    assert (gpus["Driver"], gpus["Count"], gpus["Capabilities"]) == ("nvidia", -1, [["gpu"]])


def test_kubernetes_pod_has_image_gpu_shared_memory_and_account() -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker").KubernetesWorker

    job = job_of("kubernetes", worker, image="registry/qrpo:1")

    assert job.namespace == job.job_manifest["metadata"]["namespace"] == "qrpo"
    assert job.job_manifest["spec"]["ttlSecondsAfterFinished"] == 86400
    pod = job.job_manifest["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "qrpo-worker"
    assert pod["volumes"] == [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    [container] = pod["containers"]
    assert container["image"] == "registry/qrpo:1"
    assert container["volumeMounts"] == [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"]["memory"] == "64Gi"
    assert {"name": "DO_NOT_TRACK", "value": "1"} in container["env"]
    assert "command" not in container, "the image's entry point, which passes signals on, stays"


def test_the_pipeline_and_every_stage_are_deployed() -> None:
    declared = {entry["name"]: entry for entry in declarations()}

    assert list(declared) == ["pipeline", *STAGES]
    for name, entry in declared.items():
        assert load_flow_from_entrypoint(entry["entrypoint"]).name == name
        assert set(entry) == set(declared["pipeline"])
    assert not any(declared[stage]["schedules"] for stage in STAGES)


def test_deployments_are_named_by_run_and_have_the_last_schedule_alone(
    write_task: Callable[..., Path], tmp_path: Path, qrpo: Callable[..., Any]
) -> None:
    config, store = write_task(tmp_path / "task"), tmp_path / "store"

    def schedules() -> list[tuple[Any, bool]]:
        with get_client(sync_client=True) as client:
            found = client.read_deployment_by_name("pipeline/tiny").schedules
        return [(one.schedule.cron, one.active) for one in found]

    said = []
    for options in (["--cron", "0 3 * * *"], ["--cron", "0 4 * * *"], [], ["--set", "name=other"]):
        done = qrpo("deploy", config, "--store", store, *options)
        assert done.exit_code == 0, done.stderr
        said.append((done.stdout, schedules()))
        if len(said) == 1:  # as somebody adds one in the UI
            with get_client(sync_client=True) as client:
                deployment = client.read_deployment_by_name("pipeline/tiny")
                client.create_deployment_schedules(deployment.id, [(CronSchedule(cron="0 9 * * *"), True)])

    assert [found for _, found in said] == [[("0 3 * * *", True)], [("0 4 * * *", True)], [], []]
    assert "pipeline scheduled at 0 4 * * *" in said[1][0]
    assert "no schedule" in said[2][0]
    assert "prefect deployment run pipeline/other" in said[3][0]
    with temporary_settings({PREFECT_API_URL: None}):
        done = qrpo("deploy", config, "--store", store)
    assert done.exit_code == 2
    assert "PREFECT_API_URL is not set" in done.stderr


def test_runs_of_a_dead_worker_are_ended(write_task: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_task(tmp_path / "task", name="left"))
    deploy(config, Store(tmp_path / "store"), DeployOptions(pool="left"))
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("pipeline/left")
        taken, waiting = (client.create_flow_run_from_deployment(deployment.id) for _ in range(2))
        client.set_flow_run_state(taken.id, Pending())
        since = now("UTC")
        end_runs("left", Crashed(message="its worker is gone"))
        states = [client.read_flow_run(run.id).state_name for run in (taken, waiting)]

    assert states == ["Crashed", "Scheduled"]
    assert [line.partition(": ")[2] for line in changes("left", since, {})] == ["Crashed: its worker is gone"]


def test_prefect_itself_deploys_the_pipeline_of_the_file(tmp_path: Path) -> None:
    with get_client(sync_client=True) as client:
        create_pool(client, DeployOptions())
    file = Path(__file__).parents[2] / "deployments" / "prefect.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file],
        env={**os.environ, "QRPO_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("pipeline/pipeline")
    assert (deployment.work_pool_name, deployment.work_queue_name) == ("qrpo", "gpu")
    assert deployment.pull_steps == [
        {"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}
    ]
    assert [schedule.active for schedule in deployment.schedules] == [False]
