"""The parts of `deployments/compose.yaml`, started as it says: a Prefect server on a real PostgreSQL, a worker, an S3 store.

What is deployed with `qrpo deploy` is then run by its schedule, by hand, cancelled and killed, as from the UI: through the API.
"""

import base64
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DEPLOYMENTS = Path(__file__).parent.parent.parent / "deployments"
COMPOSE = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
AUTH = "admin:a-password-of-the-test"
CONTAINER_ONLY = {"PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_URL", "AWS_ENDPOINT_URL"}


def postgres_programs() -> Path | None:
    """Where Debian keeps initdb and postgres, which are not on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(happened: Callable[[], Any], what: str, log: Path, seconds: float = 400) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, f"{what} did not happen:\n{log.read_text()[-4000:]}"
        time.sleep(0.3)
    return found


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A real PostgreSQL on a free port; its URL as the compose file writes it."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: `make system` does it")
    account: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # not below a folder that is root's alone
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    port = free_port()
    secret = folder / "password"
    secret.write_text("s3cret")
    secret.chmod(0o644)
    settings = (
        "-c",
        f"unix_socket_directories={folder}",
        "-c",
        "fsync=off",
        "-c",
        "listen_addresses=127.0.0.1",
    )
    try:
        subprocess.run(
            [
                *(programs / "initdb", "-D", folder / "data", "-U", "prefect", "-A", "scram-sha-256"),
                *(f"--pwfile={secret}", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            **account,
        )
        log = folder / "postgres.log"
        command = [str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(port), *settings]
        with running(command, log, cwd=folder, **account):
            wait_for(lambda: "ready to accept connections" in log.read_text(), "PostgreSQL's start", log)
            subprocess.run(
                [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect"],
                env={**os.environ, "PGPASSWORD": "s3cret"},
                check=True,
                capture_output=True,
                timeout=60,
            )
            yield f"postgresql+asyncpg://prefect:s3cret@127.0.0.1:{port}/prefect"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Service:
    """Server and worker of the compose file on this machine."""

    def __init__(self, folder: Path, database: str, s3_endpoint: str) -> None:
        self.port = free_port()
        self.folder = folder
        self.log = folder / "service.log"
        self.log.touch()
        self.api = f"http://127.0.0.1:{self.port}/api"
        values = {"${PREFECT_AUTH}": AUTH, "${S3_PASSWORD}": "minio-password"}
        base = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "QRPO_"))
        }
        base["PREFECT_HOME"] = str(folder / "prefect")
        self.server_environment = {
            **base,
            **environment_of("server", values),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        }
        self.client_environment = {
            **base,
            **environment_of("worker", values),
            "PREFECT_API_URL": self.api,
            "AWS_ENDPOINT_URL": s3_endpoint,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }

    def server(self) -> Any:
        command = [word.replace("0.0.0.0", "127.0.0.1") for word in COMPOSE["services"]["server"]["command"]]
        return running(
            [sys.executable, "-m", *(str(self.port) if word == "4200" else word for word in command)],
            self.log,
            env=self.server_environment,
        )

    def worker(self) -> Any:
        command = [word for word in COMPOSE["services"]["worker"]["command"] if word != "--with-healthcheck"]
        return running(
            [sys.executable, "-m", *command], self.log, env=self.client_environment, cwd=self.folder
        )

    def call(self, method: str, path: str, body: Any = None, auth: str | None = AUTH) -> Any:
        request = urllib.request.Request(
            self.api + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        if auth is not None:
            request.add_header("Authorization", f"Basic {base64.b64encode(auth.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def healthy(self) -> bool:
        try:
            return bool(self.call("GET", "/health"))
        except (urllib.error.URLError, OSError):
            return False

    def deployment(self, name: str) -> Any:
        return self.call("GET", f"/deployments/name/{name}")

    def start(self, name: str, /, **config: Any) -> str:
        """What the UI's button does; the flow run's id. `config` changes sections of the deployment's configuration."""
        deployment = self.deployment(name)
        changed = {**deployment["parameters"]["config"]}
        for section, values in config.items():
            changed[section] = {**changed[section], **values} if isinstance(values, dict) else values
        parameters = {**deployment["parameters"], "config": changed}
        run = self.call(
            "POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters}
        )
        return str(run["id"])

    def run(self, identity: str) -> Any:
        return self.call("GET", f"/flow_runs/{identity}")

    def ended(self, identity: str) -> Any:
        def end() -> Any:
            run = self.run(identity)
            return run if run["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"} else None

        return wait_for(end, "the end of the run", self.log)


def environment_of(service: str, values: dict[str, str]) -> dict[str, str]:
    """The environment that the compose file gives a service, but for the addresses of other containers."""
    environment = COMPOSE["services"][service]["environment"]
    filled = {}
    for name, value in environment.items():
        if name not in CONTAINER_ONLY:
            plain = "${" + value[2:].partition(":")[0].rstrip("}") + "}" if value.startswith("${") else value
            filled[name] = values.get(plain, plain)
    return filled


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    postgres: str,
    s3_endpoint: str,
    write_task: Callable[..., Path],
) -> Iterator[Service]:
    """All of it up, with a tiny task deployed on an S3 store and its pipeline scheduled for every minute."""
    import boto3

    folder = tmp_path_factory.mktemp("service")
    service = Service(folder, postgres, s3_endpoint)
    boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="qrpo",
        aws_secret_access_key="minio-password",
    ).create_bucket(Bucket="qrpo")
    config = write_task(folder / "task", prompts=12, policy__epochs=1, run__part_size=4)
    with service.server():
        wait_for(service.healthy, "the server's start", service.log)
        done = subprocess.run(
            [
                *(Path(sys.executable).with_name("qrpo"), "deploy", config, "--store", "s3://qrpo/store"),
                *("--json", "--cron", "* * * * *", "--set", "completions.num_ref=2"),
            ],
            env=service.client_environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "deployed.json").write_text(done.stdout)
        with service.worker():
            yield service


def test_every_flow_is_deployed_with_its_queue_and_configuration(service: Service) -> None:
    deployed = json.loads((service.folder / "deployed.json").read_text())

    assert len(deployed["deployments"]) == 9
    for name in deployed["deployments"]:
        deployment = service.deployment(name)
        assert deployment["work_pool_name"] == "qrpo"
        assert deployment["concurrency_limit"] == 1 or deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["parameters"]["store"] == "s3://qrpo/store"
        assert deployment["parameters"]["config"]["completions"]["num_ref"] == 2
        assert deployment["work_queue_name"] == ("cpu" if "prompts" in name or "quantiles" in name else "gpu")
        assert deployment["description"]
    queue = service.call("GET", "/work_pools/qrpo/queues/gpu")
    assert queue["concurrency_limit"] == 1


def test_form_in_the_ui_has_titles_descriptions_and_choices(service: Service) -> None:
    schema = service.deployment("pipeline/pipeline")["parameter_openapi_schema"]

    first = schema["properties"]["first"]
    assert first["description"] == "Start with this stage; those before must be complete."
    assert "completions" in first["enum"]
    sections = schema["definitions"]
    assert "KL penalty" in sections["PolicyConfig"]["properties"]["beta"]["description"]
    assert set(sections["EngineConfig"]["properties"]["kind"]["enum"]) == {"vllm", "transformers"}


def test_server_lets_nobody_in_without_the_password(service: Service) -> None:
    for auth in (None, "admin:wrong"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            service.call("POST", "/flow_runs/filter", {}, auth=auth)


def test_schedule_runs_the_pipeline_and_a_run_by_hand_finds_it_cached(service: Service) -> None:
    def scheduled() -> Any:
        found = service.call(
            "POST",
            "/flow_runs/filter",
            {
                "flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}},
                "flows": {"name": {"any_": ["pipeline"]}},
            },
        )
        return found[0] if found else None

    run = wait_for(scheduled, "a scheduled run", service.log, seconds=900)
    pipeline = service.deployment("pipeline/pipeline")
    for schedule in service.call("GET", f"/deployments/{pipeline['id']}/schedules"):
        service.call("PATCH", f"/deployments/{pipeline['id']}/schedules/{schedule['id']}", {"active": False})
    by_hand = service.ended(service.start("rewards/rewards"))

    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert run["auto_scheduled"]
    assert run["name"] == "tiny: prompts to evaluation (prompts.jsonl, model)"
    assert by_hand["state_type"] == "COMPLETED", by_hand["state"]["message"]
    [summary] = artifacts(service, by_hand["id"], "markdown")
    assert "Nothing to compute: all" in summary["data"]
    assert not list(service.folder.rglob("*.parquet")), "everything went to the object store"


def test_run_cancelled_from_the_ui_stops_and_keeps_its_finished_parts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, service.client_environment[name])
    store = Store("s3://qrpo/store")
    before = set(store.list("parts/completions"))
    identity = start_long_run(service)

    def committed() -> set[str]:
        return {key for key in store.list("parts/completions") if key.endswith(".json")} - before

    wait_for(committed, "the first part", service.log)
    pids = engine_processes(service)
    service.call("POST", f"/flow_runs/{identity}/set_state", {"state": {"type": "CANCELLING"}})
    run = service.ended(identity)

    assert run["state_name"] == "Cancelled", run["state"]
    assert pids
    wait_for(lambda: not any(map(alive, pids)), "the end of the run's processes", service.log, 30)
    assert len(committed()) < 24, "it was stopped in the middle"


def test_killed_run_is_crashed_with_a_reason_and_the_next_goes_on(service: Service) -> None:
    identity = start_long_run(service, seed=1)
    wait_for(lambda: service.run(identity)["state_type"] == "RUNNING", "the start", service.log)
    pids = wait_for(lambda: engine_processes(service), "the engine", service.log)

    for pid in pids:
        if b"prefect.engine" in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    run = service.ended(identity)

    assert run["state_type"] == "CRASHED"
    assert "-9" in run["state"]["message"]
    wait_for(lambda: not any(map(alive, pids)), "the end of its engine", service.log, 30)
    again = service.ended(service.start("completions/completions", name="again"))
    assert again["state_type"] == "COMPLETED", again["state"]["message"]


def start_long_run(service: Service, **config: Any) -> str:
    """A `completions` run of at least 24 slow parts that nobody has computed yet."""
    sampling = {
        "num_ref": 200,
        "samples_per_part": 25,
        "engine": {"kind": "transformers", "max_num_seqs": 4},
        "sampling": {"max_tokens": 30},
    }
    return service.start("completions/completions", name="long", completions=sampling, **config)


def artifacts(service: Service, flow_run: str, kind: str) -> Any:
    body = {"artifacts": {"flow_run_id": {"any_": [flow_run]}, "type": {"any_": [kind]}}}
    return service.call("POST", "/artifacts/filter", body)


def engine_processes(service: Service) -> list[int]:
    """The process of the flow run and all below it: those that have this service's address in their environment."""
    mine = f"PREFECT_API_URL={service.api}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes()
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if mine in environment.split(b"\0") and (b"prefect.engine" in command or b"qrpo.serving" in command):
            found.append(int(path.name))
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pid: int) -> bool:
    return bool(command_line(pid))
