"""One finished run of all stages for the tests of this folder, which copy it."""

from pathlib import Path

import pytest

from tests.support.pipeline import TinyPipeline, sample_here


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prefect_server: str) -> TinyPipeline:
    """Sampled by an engine in a child process. To be copied."""
    made = TinyPipeline.create(tmp_path_factory.mktemp("finished") / "task", tiny_model)
    made.run(made.config())
    return made


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The samples that engines are asked for; they run in this process."""
    return sample_here(monkeypatch)
