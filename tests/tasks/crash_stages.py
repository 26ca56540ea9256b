"""Ends every stage of a small pipeline at every crash point, resumes it, and compares with an uninterrupted run.

    python -m tests.tasks.crash_stages FOLDER [N]      prints one JSON object: points by stage, killed, resumed, faults

With N, stages that train or load a model are ended at every N-th point only, the others at every N/8-th.
The points take turns in how the stage ends: SIGKILL, SIGTERM, SIGINT.

An uninterrupted run goes first, and the store is copied before and after each stage. Then, for every
stage and every point at which it changes the store: a fork of this process runs the stage from the copy
before it and kills itself there; another fork runs it to the end. Every file must then be what the
uninterrupted run left once both were collected, temporary files included, apart from times; of the metrics
of training its losses and rates count. No part that was committed before the kill may change.

All stages run in the forks themselves, not in child processes, so that a kill hits their commits.
Prefect's task wrapper is removed: it does not affect what is written.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import polars
import pytest
import torch

from qrpo.tiny import build_tiny_model
from storage import Store
from storage.gc import collect, plan_gc
from storage.names import TEMPORARY
from tasks import groups, run_stage
from tasks.config import PipelineConfig
from tasks.stages import STAGES
from tests.support.crashes import in_fork, timeless
from tests.support.pipeline import TinyPipeline, sample_here

SLOW = ("reference", "policy", "evaluation")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
METRICS = ("step", "loss", "train_loss", "learning_rate", "grad_norm", "log_ratio/mean", "eval_loss")


def write_task(folder: Path) -> PipelineConfig:
    """Twelve prompts, one line broken and some prompts held out, on a model of a few thousand weights."""
    words = ["count to", "one two", "three", "no"]
    build_tiny_model(folder / "base", words, hidden_size=32, heads=1, layers=1, max_length=96)
    tiny = TinyPipeline.create(folder / "inputs", folder / "base", prompts=12)
    with (tiny.folder / "prompts.jsonl").open("a") as file:
        file.write("{broken\n")
    changes = {
        "completions.num_ref": 3,
        "policy.max_steps": 1,
        "reference.sft.max_steps": 1,
        "evaluation.num_samples": 1,
        "run": {"part_size": 32, "max_reject_fraction": 0.5},
    }
    return tiny.config(changes)


def run_here() -> None:
    """Let every stage work in this process."""

    def in_this_process(stage: Any, work: Any, *prepared: Any) -> Any:
        return stage.compute(work, *prepared)

    groups._in_child = in_this_process
    compute = groups.compute_parts.fn

    def here(label: str, work: Any, reporter: Any) -> Any:
        return compute(label, work.unquote(), reporter.unquote())

    groups.compute_parts = SimpleNamespace(with_options=lambda **_: here)
    sample_here(pytest.MonkeyPatch())


def run_one(
    stage: str,
    config: PipelineConfig,
    store: Path,
    kill_at: int | None = None,
    kill_with: int = signal.SIGKILL,
) -> tuple[int, list[str]]:
    """The exit code of a stage in a fork, ended at that crash point; the modules it loaded, and how many points it reached."""

    def run(report: Any) -> None:
        run_stage.run_stage(stage, config, str(store))
        report(json.dumps(list(sys.modules)))

    return in_fork(run, kill_at, kill_with=kill_with)


def load(modules: str) -> None:
    """Load here what a stage loaded in its fork, so that later forks need not: that takes most of their time."""
    for name in json.loads(modules):
        with suppress(Exception):
            import_module(name)


def content(store: Path) -> dict[str, str]:
    """What is in the store after `qrpo gc`, without what tells the time; of a training's metrics its losses and rates.

    In a fork: this process may start no threads, and Polars has some.
    """
    status, reports = in_fork(lambda report: report(json.dumps(_content(store))))
    assert status == 0
    seen: dict[str, str] = json.loads(reports[0])
    return seen


def _content(store: Path) -> dict[str, str]:
    collect(Store(store), plan_gc(Store(store), grace=0))
    seen = {path.name: "temporary" for path in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*")}
    for path in sorted(store.rglob("*")):
        key = path.relative_to(store).as_posix()
        if not path.is_file() or key.startswith("logs/"):
            continue
        names = key.split("/")
        if names[0] == "parts" and len(names) == 6:  # a file of a model folder, below the hash of its files
            plain = digest(path)
            if path.name == "metrics.parquet":
                metrics = polars.read_parquet(path)
                plain = str(
                    metrics.select(column for column in METRICS if column in metrics).to_dict(as_series=False)
                )
            name = "/".join([*names[:4], names[5]])
            seen[f"{name} (second copy)" if name in seen else name] = plain
        elif path.suffix == ".json":
            more = ("files", "bytes") if "policy" in names else ()
            value = timeless(json.loads(path.read_text()), "parts_computed", "parts_cached", *more)
            seen[key] = json.dumps(value, sort_keys=True)
        else:
            seen[key] = digest(path)
    return seen


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def committed(store: Path) -> dict[str, int]:
    """The payload files of committed parts, with the time of their last change in nanoseconds."""
    times = {}
    for record in store.glob("parts/*/*/*.json"):
        for _, key, _, _ in json.loads(record.read_text())["files"]:
            times[key] = (store / key).stat().st_mtime_ns
    return times


def main(folder: Path, every: int) -> dict[str, Any]:
    """Kill and resume every stage at every point, the slow ones at every `every`-th."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder / "temporary")
    Path(tempfile.tempdir).mkdir()
    run_here()
    config = write_task(folder)
    store = folder / "store"
    store.mkdir()
    points: dict[str, int] = {}
    for stage in STAGES:
        shutil.copytree(store, folder / f"before-{stage}")
        status, (modules, reached) = run_one(stage, config, store)
        assert status == 0, stage
        load(modules)
        points[stage] = int(reached)
        shutil.copytree(store, folder / f"after-{stage}")
    faults = []
    killed = resumed = unharmed = 0
    for stage, total in points.items():
        expected = content(folder / f"after-{stage}")
        for point in range(0, total, every if stage in SLOW else max(1, every // 8)):
            killed += 1
            broken = folder / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(folder / f"before-{stage}", broken)
            kill_with = SIGNALS[killed % len(SIGNALS)]
            ended = run_one(stage, config, broken, point, kill_with)[0]
            if ended != -kill_with and kill_with == signal.SIGKILL:
                faults.append(f"{stage} {point}: not killed")
            if ended == 0:  # a training notes a SIGTERM, and may have come to its end
                unharmed += 1
            before = committed(broken)
            if run_one(stage, config, broken)[0] != 0:
                faults.append(f"{stage} {point}: not resumed")
                continue
            resumed += 1
            touched = [key for key, time in before.items() if committed(broken).get(key) != time]
            if touched:
                faults.append(f"{stage} {point}: computed again {touched}")
            got = content(broken)
            if got != expected:
                different = sorted(
                    key for key in got.keys() | expected.keys() if got.get(key) != expected.get(key)
                )
                faults.append(f"{stage} {point}: differs in {different}")
    return {"points": points, "killed": killed, "resumed": resumed, "unharmed": unharmed, "faults": faults}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)) + "\n")
