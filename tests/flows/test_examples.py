"""The configurations of the paper's runs: complete and consistent, as far as can be told without GPU, network or download."""

import socket
from pathlib import Path
from typing import Any

import pytest

from flows.views.plan import preview
from storage import Store
from tasks.comparison import candidates
from tasks.config import load_config
from tasks.stages import STAGE_NAMES

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "paper").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_plan_accepts_every_run_of_the_paper_and_every_candidate_of_its_comparison(
    path: Path, tmp_path: Path
) -> None:
    config = load_config(path)
    planned = preview(config, Store(tmp_path / "store"))
    assert list(planned["stages"]) == list(STAGE_NAMES)
    assert planned["stages"]["prompts"]["reasons"] == [f"{config.prompts.source} has not been read yet"]
    assert config.name == path.stem
    every = list(candidates(config))
    assert len({one.config.name for one in every}) == len(every)
    if path.stem == "llama-num-ref":
        assert {one.config.quantiles.num_ref for one in every} == {1, 3, 10, 25, 50}
    else:
        # three betas and three learning rates of each method, as in the paper
        points = {
            (one.config.policy.loss, one.config.policy.beta, one.config.policy.learning_rate) for one in every
        }
        assert {loss for loss, _, _ in points} == {"qrpo", "dpo", "rebel", "simpo"}
        assert len(points) == len(every) == 4 * 9
    assert not list(tmp_path.iterdir()), "plan writes nothing"


def test_the_num_ref_comparison_shares_its_samples_with_the_run_on_the_same_prompts() -> None:
    scaling, run = (
        load_config(CONFIGS[0].parent / f"{name}.yaml") for name in ("llama-num-ref", "llama-magpieair")
    )
    for section in ("prompts", "reference", "rewards"):
        assert getattr(scaling, section) == getattr(run, section)
    assert scaling.completions.model_copy(update={"num_ref": run.completions.num_ref}) == run.completions
