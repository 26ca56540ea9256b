"""Work pools as `qrpo deploy` makes them, each taken by the worker class of its kind: what container or pod a run would get."""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun

import deployments
from flows.service.deploy import PoolType, job_template

pytestmark = pytest.mark.slow

FLOW_RUN = "tiny: prompts to evaluation (prompts.jsonl, base)"


def job_of(kind: PoolType, worker: Any, **more: str) -> Any:
    """What a worker makes of the pool's template and a deployment's job variables."""
    template = job_template(worker.get_default_base_job_template(), kind)
    file = Path(deployments.__path__[0], "prefect.yaml")
    variables = yaml.safe_load(file.read_text())["deployments"][0]["work_pool"]["job_variables"]
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
