"""Fixtures for all tests, created once a session: tiny models, a Prefect server, an S3 server."""

import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from storage import Store

# deadlines would fail on a busy machine
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# a suite started in the background ignores Ctrl-C, and every process that a test interrupts would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
# tests call stages outside flows, too
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
# as `qrpo` sets it; Prefect reads it when it is imported
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")

TEXTS = [
    "What is 3 plus 4? The answer is seven.",
    "Say hello to the world, my friend.",
    "List the first five letters: a b c d e.",
    "Why is the sky blue? Because of the light.",
] * 20


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer and chat template, float32, 256 tokens of context; vLLM can run it on a CPU."""
    from qrpo.tiny import build_tiny_model

    # two heads of 32: vLLM's CPU attention refuses smaller heads
    folder = tmp_path_factory.mktemp("tiny") / "language-model"
    return build_tiny_model(folder, TEXTS, hidden_size=64, heads=2, layers=2, max_length=256)


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sequence-classification Llama with one logit and the same tokenizer, float32."""
    from qrpo.tiny import build_tiny_reward_model

    folder = tmp_path_factory.mktemp("tiny") / "reward-model"
    return build_tiny_reward_model(folder, TEXTS, hidden_size=64, heads=2, layers=2, max_length=256)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A real Prefect server with a database of its own; the URL of its API, which PREFECT_API_URL names meanwhile."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    # a flow with heartbeats ends up to a second late; the flows of other processes still send them
    no_heartbeats = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        with prefect_test_harness(server_startup_timeout=300), no_heartbeats:
            url = str(PREFECT_API_URL.value())
            patch.setenv("PREFECT_API_URL", url)
            yield url


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of a real S3 server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_store(s3_endpoint: str, request: pytest.FixtureRequest) -> "Iterator[Store]":
    """A store in a bucket of its own."""
    from storage import Store
    from tests.support.flows import new_bucket

    name = f"bucket-{zlib.crc32(request.node.nodeid.encode())}"
    with new_bucket(s3_endpoint, name, "verysecretaccesskey") as bucket:
        yield Store(f"{bucket}/some/folder")


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> "Store":
    """A store on each kind of backend."""
    from storage import Store

    if request.param == "s3":
        found: Store = request.getfixturevalue("s3_store")
        return found
    return Store(
        tmp_path / "store" if request.param == "local" else f"memory://{tmp_path.name}-{os.getpid()}/store"
    )
