"""`qrpo run` killed with SIGKILL in the middle of a stage: nothing survives it, nothing whole is lost, the result is the same."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Snapshot = dict[str, tuple[int, str]]
TABLES = ("prompts", "completions", "rewards", "quantiles", "shards")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path]) -> Path:
    """Many small parts and a checkpoint after every step, so that there is a middle to be killed in."""
    return write_task(
        tmp_path_factory.mktemp("killed") / "task",
        prompts=48,
        completions__engine={"kind": "transformers", "max_num_seqs": 4},
        completions__sampling={"max_tokens": 24},
        completions__samples_per_part=4,
        policy={"learning_rate": 1e-3, "num_train_epochs": 4, "prompts_per_step": 4, "save_steps": 3},
        run__part_size=4,
    )


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
    config: Path,
    qrpo_process: Callable[..., Any],
    prefect_server: str,
) -> tuple[Path, dict[str, Any]]:
    """A run that nobody killed: its store and summary."""
    store = tmp_path_factory.mktemp("uninterrupted") / "store"
    done = qrpo_process(
        "run", config, "--store", store, "--until", "policy", "--json", PREFECT_API_URL=prefect_server
    )
    assert done.returncode == 0, done.stderr
    return store, json.loads(done.stdout)


@pytest.fixture(scope="module")
def killed_twice(
    tmp_path_factory: pytest.TempPathFactory,
    config: Path,
    start_qrpo: Callable[..., "subprocess.Popen[bytes]"],
    qrpo_process: Callable[..., Any],
    prefect_server: str,
    snapshot: Callable[[Path], Snapshot],
) -> dict[str, Any]:
    """One run killed in `completions`, then in `policy`, then left to end: what was there each time."""
    folder = tmp_path_factory.mktemp("killed-twice")
    store = folder / "store"
    arguments = ("run", config, "--store", store, "--until", "policy")
    seen: dict[str, Any] = {"store": store}

    process = start_qrpo(folder / "first.log", *arguments)
    wait_for(lambda: any(store.glob("parts/completions/*/*.json")), process, folder / "first.log")
    seen["left after completions"] = kill(process)
    seen["after completions"] = snapshot(store)

    process = start_qrpo(folder / "second.log", *arguments)
    wait_for(lambda: any(store.glob("work/policy/*/checkpoint-*/whole.json")), process, folder / "second.log")
    seen["left after policy"] = kill(process)
    seen["after policy"] = snapshot(store)

    done = qrpo_process(*arguments, "--json", PREFECT_API_URL=prefect_server)
    assert done.returncode == 0, done.stderr
    seen["summary"] = json.loads(done.stdout)
    seen["at the end"] = snapshot(store)
    seen["log"] = (store / "logs" / "tiny" / "policy.log").read_text()
    return seen


def wait_for(happened: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, f"it ended before it could be killed:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def kill(process: "subprocess.Popen[bytes]") -> list[str]:
    """Kill the run with SIGKILL; the commands of its descendants that are still there some seconds later."""
    family = descendants(process.pid)
    assert family, "the run has no child process, so nothing is shown"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while (left := [command for pid, command in family.items() if alive(pid, command)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    return left


def descendants(parent: int) -> dict[int, str]:
    """Process id and command line of every process that descends from this one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(
                int(path.parent.name)
            )
        except OSError:
            continue
    found: dict[int, str] = {}
    waiting = [parent]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            found[child] = command_of(child)
            waiting.append(child)
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def alive(pid: int, command: str) -> bool:
    """Whether that process still runs; one that ended and was not reaped has no command line."""
    return bool(command) and command_of(pid) == command


def whole_parts(files: Snapshot) -> Snapshot:
    """The files of parts that are committed: their record is there."""
    records = {
        name.removesuffix(".json") for name in files if name.startswith("parts/") and name.endswith(".json")
    }
    return {
        name: file
        for name, file in files.items()
        if name.startswith("parts/") and any(name.startswith((f"{part}.", f"{part}/")) for part in records)
    }


@pytest.mark.parametrize("stage", ["completions", "policy"])
def test_no_process_survives_the_kill(killed_twice: dict[str, Any], stage: str) -> None:
    assert killed_twice[f"left after {stage}"] == []


def test_the_kills_came_in_the_middle(killed_twice: dict[str, Any]) -> None:
    stages = killed_twice["summary"]["stages"]
    sampled = [
        n
        for n in killed_twice["after completions"]
        if n.startswith("parts/completions/") and n.endswith(".json")
    ]

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
    import polars as pl

    (metrics,) = killed_twice["store"].glob("parts/policy/*/*/*/metrics.parquet")
    steps = pl.read_parquet(metrics).filter(pl.col("loss").is_not_null())["step"].to_list()

    assert steps == list(range(1, 49))
    assert not any(name.startswith("work/policy/") for name in killed_twice["at the end"]), (
        "scratch is cleared"
    )


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
    import polars as pl

    files = killed_twice["at the end"]
    parts = [
        name
        for name in files
        if name.startswith("parts/") and name.endswith(".parquet") and name.count("/") == 3
    ]

    assert all(f"{name.removesuffix('.parquet')}.json" in files for name in parts)
    for stage in TABLES:
        assert (
            pl.scan_parquet(killed_twice["store"] / "parts" / stage / "*" / "*.parquet").collect().height > 0
        )
