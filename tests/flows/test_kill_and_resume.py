"""`qrpo run` killed with SIGKILL in the middle of a stage: nothing survives it, nothing whole is lost, the result is the same."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.support.flows import QRPO, clean_environment, run_json
from tests.support.processes import descendants, eventually, running, survivors

pytestmark = pytest.mark.slow

Snapshot = dict[str, tuple[int, str]]
TABLES = ("prompts", "completions", "rewards", "quantiles", "shards")
STEPS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path]) -> Path:
    """Many small parts and a checkpoint after every third step, so that there is a middle to be killed in."""
    return write_task(
        tmp_path_factory.mktemp("killed") / "task",
        prompts=24,
        completions__engine={"kind": "transformers", "max_num_seqs": 4},
        completions__sampling={"max_tokens": 24},
        completions__samples_per_part=4,
        policy={"learning_rate": 1e-3, "num_train_epochs": 4, "prompts_per_step": 4, "save_steps": 3},
        run__part_size=4,
    )


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, config: Path, prefect_server: str
) -> tuple[Path, dict[str, Any]]:
    """A run that nobody killed: its store and summary."""
    store = tmp_path_factory.mktemp("uninterrupted") / "store"
    return store, run_json("run", config, "--store", store, "--until", "policy")


@pytest.fixture(scope="module")
def killed_twice(
    tmp_path_factory: pytest.TempPathFactory,
    config: Path,
    prefect_server: str,
    snapshot: Callable[[Path], Snapshot],
) -> dict[str, Any]:
    """One run killed in `completions`, then in `policy`, then left to end: what was there each time."""
    folder = tmp_path_factory.mktemp("killed-twice")
    store = folder / "store"
    arguments = ("run", config, "--store", store, "--until", "policy")
    seen: dict[str, Any] = {"store": store}
    middles = {
        "completions": "parts/completions/*/*.json",
        "policy": "work/policy/*/*/checkpoint-*/whole.json",
    }
    for stage, middle in middles.items():
        log = folder / f"{stage}.log"
        # without PREFECT_API_URL it starts a server, which must not survive either
        server = {} if stage == "completions" else {"PREFECT_API_URL": prefect_server}
        with running([QRPO, *arguments], log, env=clean_environment(**server)) as process:
            eventually(lambda: any(store.glob(middle)), middle, every=0.01, log=log, process=process)  # noqa: B023
            family = descendants(process.pid)
            assert family, "the run has no child process, so nothing is shown"
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            seen[f"left after {stage}"] = survivors(family, seconds=20)
            seen[f"after {stage}"] = snapshot(store)
    seen["summary"] = run_json(*arguments)
    seen["at the end"] = snapshot(store)
    return seen


def whole_parts(files: Snapshot) -> Snapshot:
    """The files of parts that are committed: their record is there."""
    parts = {name: file for name, file in files.items() if name.startswith("parts/")}
    records = {name.removesuffix(".json") for name in parts if name.endswith(".json")}
    return {
        name: file
        for name, file in parts.items()
        if any(name.startswith((f"{part}.", f"{part}/")) for part in records)
    }


@pytest.mark.parametrize("stage", ["completions", "policy"])
def test_no_process_survives_the_kill(killed_twice: dict[str, Any], stage: str) -> None:
    assert killed_twice[f"left after {stage}"] == []


def test_the_kills_came_in_the_middle(killed_twice: dict[str, Any]) -> None:
    stages = killed_twice["summary"]["stages"]
    after = killed_twice["after completions"]
    sampled = [name for name in after if name.startswith("parts/completions/") and name.endswith(".json")]

    assert 1 <= len(sampled) < stages["completions"]["parts_cached"]
    assert not any(name.startswith("parts/policy/") for name in killed_twice["after policy"])
    assert stages["policy"]["parts_computed"] == 1


def test_finished_parts_are_untouched(killed_twice: dict[str, Any]) -> None:
    final = killed_twice["at the end"]

    for moment in ("after completions", "after policy"):
        before = whole_parts(killed_twice[moment])
        assert before
        assert {name: final[name] for name in before} == before


def test_training_goes_on_from_the_checkpoint(killed_twice: dict[str, Any]) -> None:
    (metrics,) = killed_twice["store"].glob("parts/policy/*/*/*/metrics.parquet")
    steps = pl.read_parquet(metrics).filter(pl.col("loss").is_not_null())["step"].to_list()

    assert steps == list(range(1, STEPS + 1))
    left = [name for name in killed_twice["at the end"] if name.startswith("work/policy/")]
    assert not left, "scratch is cleared"


def test_result_is_that_of_an_uninterrupted_run(
    killed_twice: dict[str, Any],
    uninterrupted: tuple[Path, dict[str, Any]],
    snapshot: Callable[[Path], Snapshot],
) -> None:
    store, summary = uninterrupted
    ours, theirs = killed_twice["summary"]["stages"], summary["stages"]

    assert {name: stage["fingerprint"] for name, stage in ours.items()} == {
        name: stage["fingerprint"] for name, stage in theirs.items()
    }
    expected = {name: digest for name, (_, digest) in snapshot(store).items()}
    final = {name: digest for name, (_, digest) in killed_twice["at the end"].items()}
    for stage in TABLES:
        payloads = {
            n: d for n, d in expected.items() if n.startswith(f"parts/{stage}/") and n.endswith(".parquet")
        }
        assert payloads
        assert {name: final.get(name) for name in payloads} == payloads
    # the folder's name is a digest that covers the timings in metrics.parquet too, hence the values alone
    weights = [
        {d for n, d in files.items() if n.endswith("/model.safetensors")} for files in (expected, final)
    ]
    assert weights[0] == weights[1]
    assert len(weights[0]) == 1


def test_nothing_half_written_is_left_in_sight(killed_twice: dict[str, Any]) -> None:
    files = killed_twice["at the end"]
    parts = [name for name in files if name.startswith("parts/") and name.endswith(".parquet")]

    for name in parts:
        if name.count("/") == 3:
            assert f"{name.removesuffix('.parquet')}.json" in files
    for stage in TABLES:
        assert (
            pl.scan_parquet(killed_twice["store"] / "parts" / stage / "*" / "*.parquet").collect().height > 0
        )


def test_a_run_that_slept_past_its_lease_stops_and_the_other_ends_right(
    tmp_path: Path, config: Path, uninterrupted: tuple[Path, dict[str, Any]], prefect_server: str
) -> None:
    command = [QRPO, "run", config, "--store", tmp_path / "store", "--until", "policy"]
    command += ["--set", "run.lease_ttl=2"]
    checkpoints = "store/work/policy/*/*/checkpoint-*/whole.json"
    environment = clean_environment() | {"PREFECT_API_URL": prefect_server}
    logs = tmp_path / "slept.log", tmp_path / "other.log"
    with running(command, logs[0], env=environment) as slept:
        eventually(
            lambda: any(tmp_path.glob(checkpoints)), checkpoints, every=0.01, log=logs[0], process=slept
        )
        asleep = [slept.pid, *(one.pid for one in descendants(slept.pid))]
        for pid in asleep:
            os.kill(pid, signal.SIGSTOP)
        (before,) = {path.parents[1] for path in tmp_path.glob(checkpoints)}
        with running(command, logs[1], env=environment) as other:
            eventually(lambda: not before.exists(), "the take-over", every=0.01, log=logs[1], process=other)
            for pid in asleep:
                os.kill(pid, signal.SIGCONT)
            assert slept.wait(timeout=300) == 1
            assert other.wait(timeout=300) == 0, logs[1].read_text()[-3000:]

    said = logs[0].read_text()
    assert re.search(r"policy part \w+ was taken over by (process \d+ on|another run)", said), said[-3000:]
    assert "disk space" not in said
    assert not list(tmp_path.glob("store/work/policy/*/*"))
    weights = [
        {path.read_bytes() for path in folder.glob("parts/policy/*/*/*/model.safetensors")}
        for folder in (tmp_path / "store", uninterrupted[0])
    ]
    assert weights[0] == weights[1]
    assert len(weights[0]) == 1
