"""Where groups are computed: how workers are counted, which GPUs each sees, and what is refused."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qrpo.errors import ConfigError
from storage import Store
from tasks.config import PipelineConfig, parse_config
from tasks.runners import RemoteWork, WorkerPool, WorkerSetup, uses_workers
from tasks.stages import STAGES


def settings(model: Path, **run: Any) -> PipelineConfig:
    return parse_config(
        {
            "prompts": {"source": "prompts.jsonl"},
            "reference": {"model": {"path": str(model)}},
            "completions": {"engine": {"tensor_parallel_size": 2}},
            "rewards": [{"kind": "function", "name": "r", "function": "reward.py:reward"}],
            "run": run,
        }
    )


def test_each_stage_needs_the_gpus_of_what_it_runs(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    gpus = ("0", "1", "2", "3", "4", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    config = settings(tiny_model, runner="process")
    workers = WorkerPool(config, "store", uses_gpu=True)
    assert (workers.count, workers.gpus_per_worker) == (3, 2), "by default those of the engine"
    setup = workers.setup
    assert (setup.driver, setup.gpus, setup.gpus_per_worker) == (os.getpid(), gpus, 2)

    judged = {"kind": "model", "model": {"path": str(tiny_model)}, "tensor_parallel_size": 3}
    raw = config.model_dump(mode="json") | {"rewards": [judged], "policy": {"processes": 4}}
    config = parse_config(raw)
    needs = {name: stage.gpus(stage.settings_of(config)) for name, stage in STAGES.items() if stage.uses_gpu}

    engine_and_reward = {"completions": 2, "rewards": 3, "evaluation": 3}
    assert needs == {"reference": 1, "shards": 1, "policy": 4, **engine_and_reward}
    assert WorkerPool(config, "store", uses_gpu=True, need=needs["shards"]).count == 6


def test_a_stage_without_a_model_takes_no_gpu_and_its_groups_suffice_for_all_workers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    workers = WorkerPool(settings(tiny_model, runner="process", workers=4), "store", uses_gpu=False)

    assert (workers.count, workers.gpus_per_worker) == (4, 0)
    assert [workers.group_size(parts, maximum=32) for parts in (1000, 40, 3)] == [32, 5, 1]


def test_workers_that_cannot_work_are_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match="2 workers of 2 GPUs each do not fit the 3 GPUs"):
        WorkerPool(settings(tiny_model, runner="dask", workers=2), "store", uses_gpu=True)
    with pytest.raises(ConfigError, match="memory://"):  # a store of one process alone
        WorkerPool(settings(tiny_model, runner="ray"), "memory://store", uses_gpu=True)
    with pytest.raises(ConfigError, match="set runner to dask or ray, got 'process'"):
        settings(tiny_model, runner="process", cluster="tcp://head:8786")


def test_single_part_stays_in_this_process_unless_there_is_a_cluster(tiny_model: Path):
    assert not uses_workers(settings(tiny_model, runner="ray"), 1)
    assert uses_workers(settings(tiny_model, runner="ray"), 2)
    assert uses_workers(settings(tiny_model, runner="ray", cluster="ray://head:10001"), 1)
    assert not uses_workers(settings(tiny_model), 100)


def test_runner_is_not_in_any_fingerprint(tiny_model: Path):
    from qrpo.config import keyed

    assert keyed(settings(tiny_model).run) == keyed(settings(tiny_model, runner="ray", workers=3).run)


def test_two_workers_of_a_pool_see_different_gpus(tiny_model: Path):
    setup = WorkerSetup("process", "session", os.getpid(), ("4", "5", "6", "7"), 2)
    work = RemoteWork(STAGES["completions"].work(settings(tiny_model), Store("store")), setup)
    context = multiprocessing.get_context("spawn")

    with context.Manager() as manager, ProcessPoolExecutor(2, mp_context=context) as pool:
        both = manager.Barrier(2)
        seen = list(pool.map(visible_gpus, [work] * 2, [both] * 2))

    assert sorted(seen) == ["4,5", "6,7"]


def visible_gpus(work: RemoteWork, both: Any) -> str:
    work.receive()
    both.wait(timeout=120)  # so that no worker answers twice
    return os.environ["CUDA_VISIBLE_DEVICES"]
