"""Ends every stage of a small pipeline at every crash point, resumes it, and compares with an uninterrupted run.

    python -m tests.tasks.crash_stages FOLDER [N]      prints one JSON object: points by stage, killed, resumed, faults

With N, stages that train or load a model are ended at every N-th point only, the others at every N/8-th.
The points take turns in how the stage ends: SIGKILL, SIGTERM, SIGINT.

An uninterrupted run goes first, and the store is copied before and after each stage. Then, for every
stage and every point at which it changes the store: a fork of this process runs the stage from the copy
before it and kills itself there; another fork runs it to the end. Every file must then be what the
uninterrupted run left, apart from times, the metrics of training and gc's work included, and no part
that was committed before the kill may change.

All stages run in the forks themselves, not in child processes, so that a kill hits their commits.
Prefect's task wrapper is removed: it does not affect what is written.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import polars
import torch

from qrpo.engines.transformers import TransformersEngine
from qrpo.tiny import build_tiny_model
from storage import Store
from storage.gc import collect, plan_gc
from tasks import groups, run_stage
from tasks.config import PipelineConfig, parse_config
from tasks.stages import STAGES, completions, evaluation
from tests.support.crashes import in_fork, timeless

SLOW = ("reference", "policy", "evaluation")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
METRICS = ("step", "loss", "train_loss", "learning_rate", "grad_norm", "log_ratio/mean", "eval_loss")
REWARD = "def reward(prompts, completions, **columns):\n    return [len(text) + text.count('a') / 7 for text in completions]\n"


def write_task(folder: Path) -> PipelineConfig:
    """Twelve prompts, one of them broken and two held out, on a model of a few thousand weights."""
    words = ["alpha beta", "gamma a", "delta aa", "epsilon"]
    build_tiny_model(folder / "base", words, hidden_size=32, heads=1, layers=1, max_length=96)
    rows = [{"prompt": f"{words[i % 4]} {i}", "completion": words[(i + 1) % 4]} for i in range(12)]
    lines = [json.dumps(row) for row in rows] + ["{broken"]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(REWARD)
    return parse_config(
        {
            "name": "crash",
            "prompts": {"source": str(folder / "prompts.jsonl"), "eval_fraction": 0.3},
            "reference": {
                "model": {"path": str(folder / "base")},
                "sft": {"max_steps": 1, "prompts_per_step": 8},
            },
            "completions": {
                "num_ref": 3,
                "samples_per_part": 2,
                "engine": {"kind": "transformers"},
                "sampling": {"max_tokens": 6},
            },
            "rewards": [{"kind": "function", "function": f"{folder / 'reward.py'}:reward"}],
            "policy": {"max_steps": 1, "prompts_per_step": 8},
            "evaluation": {"num_samples": 1},
            "run": {"part_size": 32, "max_reject_fraction": 0.5},
        }
    )


class EngineHere:
    """The transformers engine in this process, one for each model folder."""

    def __init__(self, config: Any, model: Any) -> None:
        self.max_model_len = 96
        self._engine = TransformersEngine(config, model, self.max_model_len)

    def sample(self, requests: Any, sampling: Any) -> Any:
        return self._engine.sample(requests, sampling)


def run_here() -> None:
    """Let every stage work in this process."""

    def in_this_process(stage: Any, work: Any, *prepared: Any) -> Any:
        return stage.compute(work, *prepared)

    groups._in_child = in_this_process
    compute = groups.compute_parts.fn

    def here(label: str, work: Any, reporter: Any) -> Any:
        return compute(label, work.unquote(), reporter.unquote())

    groups.compute_parts = SimpleNamespace(with_options=lambda **_: here)
    for module in (completions, evaluation):
        module.engine_for = lambda config, model, log: EngineHere(config, model)


def run_one(
    stage: str,
    config: PipelineConfig,
    store: Path,
    kill_at: int | None = None,
    kill_with: int = signal.SIGKILL,
) -> tuple[int, int]:
    """The exit code of a stage in a fork, ended at that crash point, and how many points it reached."""
    status, reports = in_fork(
        lambda _: run_stage.run_stage(stage, config, str(store)), kill_at, kill_with=kill_with
    )
    return status, int(reports[-1]) if status == 0 else 0


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
    seen = {}
    for path in sorted(store.rglob("*")):
        key = path.relative_to(store).as_posix()
        if not path.is_file() or key.startswith("logs/") or "/." in f"/{key}":
            continue
        names = key.split("/")
        if names[0] == "parts" and len(names) == 6:  # a file of a model folder, below the hash of its files
            plain = digest(path)
            if path.name == "metrics.parquet":
                metrics = polars.read_parquet(path)
                plain = str(
                    metrics.select(column for column in METRICS if column in metrics).to_dict(as_series=False)
                )
            seen["/".join([*names[:4], names[5]])] = plain
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
    run_here()
    config = write_task(folder)
    store = folder / "store"
    store.mkdir()
    points: dict[str, int] = {}
    for stage in STAGES:
        shutil.copytree(store, folder / f"before-{stage}")
        status, points[stage] = run_one(stage, config, store)
        assert status == 0, stage
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
