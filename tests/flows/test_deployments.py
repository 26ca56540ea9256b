"""The parts of `deployments/compose.yaml`, started as it says: a Prefect server on a real PostgreSQL, a worker, an S3 store.

What is deployed with `qrpo deploy` is then run by its schedule, by hand, cancelled and killed, as from the UI: through the API.
One run after the other on one store, each going on from what the one before left.
"""

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from storage import Store
from tests.support.flows import QRPO, clean_environment, copy_store, digests, new_bucket
from tests.support.processes import Process, eventually, free_port, processes, running, survivors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
COMPOSE = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
STORE = "s3://qrpo/store"
AUTH = "admin:a-password-of-the-test"
CONTAINER_ONLY = {"PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_URL", "AWS_ENDPOINT_URL"}


def postgres_programs() -> Path | None:
    """Where Debian keeps initdb and postgres, which are not on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


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
    settings = [f"unix_socket_directories={folder}", "fsync=off", "listen_addresses=127.0.0.1"]
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
        command = [programs / "postgres", "-D", folder / "data", "-p", port]
        command += [word for setting in settings for word in ("-c", setting)]
        with running(command, log, cwd=folder, **account):
            ready = "ready to accept connections"
            eventually(lambda: ready in log.read_text(), "PostgreSQL's start", log=log)
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
        values = {
            "${PREFECT_AUTH}": AUTH,
            "${S3_PASSWORD}": "minio-password",
            "${UI_URL}": f"http://127.0.0.1:{self.port}",
        }
        base = clean_environment(PREFECT_HOME=str(folder / "prefect"))
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
            [sys.executable, "-m", *(self.port if word == "4200" else word for word in command)],
            self.log,
            env=self.server_environment,
        )

    def worker(self) -> Any:
        command = [word for word in COMPOSE["services"]["worker"]["command"] if word != "--with-healthcheck"]
        return running(
            [sys.executable, "-m", *command], self.log, env=self.client_environment, cwd=self.folder
        )

    def call(self, method: str, path: str, body: Any = None, auth: str | None = AUTH) -> Any:
        login = httpx.BasicAuth(*auth.split(":")) if auth else None
        answer = httpx.request(method, self.api + path, json=body, auth=login, timeout=60)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def healthy(self) -> bool:
        try:
            return bool(self.call("GET", "/health"))
        except httpx.HTTPError:
            return False

    def deployment(self, name: str) -> Any:
        return self.call("GET", f"/deployments/name/{name}")

    def start(self, name: str, **config: Any) -> str:
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

        return eventually(end, "the end of the run", every=0.2, log=self.log)

    def filtered(self, what: str, **filters: Any) -> Any:
        return self.call("POST", f"/{what}/filter", filters)

    def stored(self, stage: str) -> dict[str, str]:
        """The committed parts of a stage in the service's store."""
        return digests(Store(STORE), stage)


def environment_of(service: str, values: dict[str, str]) -> dict[str, str]:
    """The environment that the compose file gives a service, but for the addresses of other containers."""
    environment = COMPOSE["services"][service]["environment"]
    filled = {}
    for name, value in environment.items():
        if name not in CONTAINER_ONLY:
            plain = "${" + value[2:].partition(":")[0].rstrip("}") + "}" if value.startswith("${") else value
            filled[name] = values.get(plain, plain)
    return filled


SECRET = "17.259371"
PARTS = 32  # of completions: 4 blocks of samples for each of the 8 groups that the 8 prompts fall into
REWARD = """\
import os


def reward(prompts, completions, answer, **columns):
    scale = float(os.environ["REWARD_SCALE"])
    return [scale * sum(letter in right for letter in said) for said, right in zip(completions, answer, strict=True)]
"""
# how many at once changes no result
BUSY = {"completions": {"engine": {"kind": "transformers", "max_num_seqs": 64}}}


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[str, list[str]]]:
    """Somebody who is told of failures: an address, and what was posted there."""
    posted: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", posted
        server.shutdown()


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    postgres: str,
    s3_endpoint: str,
    write_task: Callable[..., Path],
    told: tuple[str, list[str]],
) -> Iterator[Service]:
    """All of it up, with a tiny task of many slowly sampled parts deployed on an S3 store, its pipeline every ten seconds."""
    folder = tmp_path_factory.mktemp("service")
    service = Service(folder, postgres, s3_endpoint)
    config = write_task(
        folder / "task",
        prompts=8,
        completions__num_ref=32,
        completions__samples_per_part=8,
        completions__engine={"kind": "transformers", "max_num_seqs": 1},
        completions__sampling={"max_tokens": 30},
        run__part_size=2,
    )
    (config.parent / "reward.py").write_text(REWARD)
    keys = service.client_environment
    with new_bucket(s3_endpoint, "qrpo", keys["AWS_SECRET_ACCESS_KEY"]), service.server():
        eventually(service.healthy, "the server's start", log=service.log)
        with service.worker():
            make_blocks(service, told[0])
            options = ("--store", STORE, "--json", "--cron", "* * * * * */10")
            options += ("--set", "run.parts_per_task=7", "--notify", "custom-webhook/alerts")
            done = qrpo(service, "deploy", config, *options, "--secret", "REWARD_SCALE=reward-scale")
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "deployed.json").write_text(done.stdout)
            yield service


def make_blocks(service: Service, receiver: str) -> None:
    """What a person makes once under Blocks in the UI: a secret, and where to send what."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.blocks.system import Secret
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: service.api, PREFECT_API_AUTH_STRING: AUTH}):
        Secret(value=SECRET).save("reward-scale")
        body = {"text": "{{subject}}\n{{body}}"}
        CustomWebhookNotificationBlock(name="alerts", url=receiver, json_data=body).save("alerts")


def qrpo(service: Service, *arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The `qrpo` command beside the service's server."""
    return subprocess.run(
        [QRPO, *arguments],
        env={**service.client_environment, **environment},
        cwd=service.folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_flow_is_deployed_with_its_queue_configuration_and_form_behind_a_login(
    service: Service,
) -> None:
    deployed = json.loads((service.folder / "deployed.json").read_text())

    assert len(deployed["deployments"]) == 9
    for name in deployed["deployments"]:
        deployment = service.deployment(name)
        assert deployment["work_pool_name"] == "qrpo"
        assert deployment["concurrency_limit"] == 1 or deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["parameters"]["store"] == "s3://qrpo/store"
        assert deployment["parameters"]["config"]["run"]["parts_per_task"] == 7
        assert deployment["work_queue_name"] == ("cpu" if "prompts" in name or "quantiles" in name else "gpu")
        assert deployment["description"]
        environment = deployment["job_variables"]["env"]
        assert environment["REWARD_SCALE"] == "{{ prefect.blocks.secret.reward-scale }}"
        assert environment["DO_NOT_TRACK"] == "1"
    assert service.call("GET", "/work_pools/qrpo/queues/gpu")["concurrency_limit"] == 1
    schema = service.deployment("pipeline/tiny")["parameter_openapi_schema"]  # of the form in the UI
    first = schema["properties"]["first"]
    assert first["description"] == "Start with this stage; those before must be complete."
    assert "completions" in first["enum"]
    sections = schema["definitions"]
    assert "KL penalty" in sections["PolicyConfig"]["properties"]["beta"]["description"]
    assert set(sections["EngineConfig"]["properties"]["kind"]["enum"]) == {"vllm", "transformers"}
    for auth in (None, "admin:wrong"):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            service.call("POST", "/flow_runs/filter", {}, auth=auth)


@pytest.fixture(scope="module")
def cancelled(service: Service) -> tuple[Any, list[Process], dict[str, str]]:
    """The first run of the schedule, cancelled while it samples: how it ended, its processes, the parts that it finished."""
    pipeline = service.deployment("pipeline/tiny")

    def runs(state: str) -> Any:
        of_pipeline = {"state": {"type": {"any_": [state]}}, "deployment_id": {"any_": [pipeline["id"]]}}
        return service.filtered("flow_runs", flow_runs=of_pipeline)

    [scheduled] = eventually(lambda: runs("RUNNING"), "a scheduled run", log=service.log)
    for schedule in service.call("GET", f"/deployments/{pipeline['id']}/schedules"):
        service.call("PATCH", f"/deployments/{pipeline['id']}/schedules/{schedule['id']}", {"active": False})
    for run in runs("SCHEDULED"):  # those that were due meanwhile
        service.call("DELETE", f"/flow_runs/{run['id']}")
    eventually(lambda: service.stored("completions"), "the first part", log=service.log)
    family = run_processes(service)
    service.call("POST", f"/flow_runs/{scheduled['id']}/set_state", {"state": {"type": "CANCELLING"}})
    return service.ended(scheduled["id"]), family, service.stored("completions")


def test_run_of_the_schedule_cancelled_from_the_ui_stops_and_keeps_its_finished_parts(
    cancelled: tuple[Any, list[Process], dict[str, str]],
) -> None:
    run, family, parts = cancelled

    assert run["auto_scheduled"]
    assert run["name"] == "tiny: prompts to evaluation (prompts.jsonl, model)"
    assert run["state_name"] == "Cancelled", run["state"]
    assert len(family) > 1
    assert not survivors(family, seconds=30)
    assert 0 < len(parts) < PARTS, "it was stopped in the middle"


@pytest.fixture(scope="module")
def killed(service: Service, cancelled: object) -> tuple[Any, list[Process]]:
    """A `completions` run started by hand whose process is killed: how it ended, its engine."""
    identity = service.start("completions/tiny")
    family = eventually(lambda: both_processes(service), "the engine", log=service.log)
    for one in family:
        if not one.serves_a_child:
            os.kill(one.pid, signal.SIGKILL)
    return service.ended(identity), [one for one in family if one.serves_a_child]


def test_killed_run_is_crashed_with_a_reason_which_is_told(
    service: Service, killed: tuple[Any, list[Process]], told: tuple[str, list[str]]
) -> None:
    run, engine = killed

    assert run["state_type"] == "CRASHED"
    assert "-9" in run["state"]["message"]
    assert not survivors(engine, seconds=30)
    [message] = eventually(lambda: told[1], "the message", seconds=60, log=service.log)
    assert "QRPO: tiny: completions (prompts.jsonl, model) Crashed" in message
    assert run["state"]["message"].splitlines()[0][:40] in message
    assert f"http://127.0.0.1:{service.port}/runs/flow-run/{run['id']}" in message


@pytest.fixture(scope="module")
def finished(service: Service, killed: object) -> Any:
    """A `completions` run that goes on to the end."""
    return service.ended(service.start("completions/tiny", **BUSY))


def test_next_run_goes_on_from_what_was_finished(
    service: Service, cancelled: tuple[Any, list[Process], dict[str, str]], finished: Any
) -> None:
    assert finished["state_type"] == "COMPLETED", finished["state"]["message"]
    markdown = {"flow_run_id": {"any_": [finished["id"]]}, "type": {"any_": ["markdown"]}}
    [summary] = service.filtered("artifacts", artifacts=markdown)
    found = re.search(r"(\d+) parts computed in .* s, (\d+) from the store", summary["data"])
    assert found, summary["data"]
    computed, cached = map(int, found.groups())
    parts = service.stored("completions")
    assert cached >= len(cancelled[2])
    assert computed + cached == len(parts) == PARTS
    assert parts | cancelled[2] == parts
    assert not list(service.folder.rglob("*.parquet")), "everything went to the object store"


def test_deployment_command_and_python_come_to_the_same_and_the_secret_stays_where_it_is(
    service: Service, finished: Any
) -> None:
    config = service.folder / "task" / "config.yaml"
    command, python = Store("s3://qrpo/command"), Store("s3://qrpo/python")
    for store in (command, python):
        copy_store(Store(STORE), store)
    program = "import sys; from flows import rewards; from tasks.config import load_config; "
    program += "rewards(load_config(sys.argv[1]), sys.argv[2])"

    by_deployment = service.start("rewards/tiny")
    with ThreadPoolExecutor() as pool:
        options = ("--only", "rewards", "--store", command.url, "--json")
        typed = pool.submit(qrpo, service, "run", config, *options, REWARD_SCALE=SECRET)
        from_python = subprocess.run(
            [sys.executable, "-c", program, config, python.url],
            env={**service.client_environment, "REWARD_SCALE": SECRET},
            capture_output=True,
            text=True,
            timeout=600,
        )
    run = service.ended(by_deployment)

    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert from_python.returncode == 0, from_python.stderr
    assert typed.result().returncode == 0, typed.result().stderr
    assert json.loads(typed.result().stdout)["stages"]["rewards"]["parts_computed"] == PARTS
    parts = service.stored("rewards")
    assert len(parts) == PARTS
    assert digests(command, "rewards") == digests(python, "rewards") == parts
    logs = service.filtered("logs", limit=200)
    assert logs
    seen = [service.call("GET", "/work_pools/qrpo"), service.filtered("deployments"), logs, run]
    seen += [Store(STORE).read_bytes(key).decode() for key in Store(STORE).list() if key.endswith(".json")]
    assert SECRET not in json.dumps(seen) + service.log.read_text()


def run_processes(service: Service) -> list[Process]:
    """The processes of a flow run: those that have this service's address in their environment."""
    mine = f"PREFECT_API_URL={service.api}".encode()
    return [
        one
        for one in processes()
        if (one.serves_a_child or "prefect.engine" in one.command) and mine in environment_bytes(one.pid)
    ]


def both_processes(service: Service) -> list[Process] | None:
    """The processes of a flow run, once its engine has started."""
    family = run_processes(service)
    return family if any(one.serves_a_child for one in family) else None


def environment_bytes(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
