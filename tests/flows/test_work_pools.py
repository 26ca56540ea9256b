"""What `qrpo deploy` declares: the list of deployments, and the job that the worker class of each kind of pool makes of it."""

import asyncio
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flows import load_flow_from_entrypoint

from flows.service.deploy import DeployOptions, PoolType, create_pool, declarations, job_template
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
