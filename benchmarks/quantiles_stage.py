"""Quantile rewards from Parquet: our computation and our whole stage beside Polars, DuckDB and Hugging Face datasets.

    python benchmarks/quantiles_stage.py [--prompts 100000] [--runs 5] [--out quantiles_stage.json]
    python benchmarks/quantiles_stage.py --scaling [--out quantiles_scaling.json]

One file of list columns, as research code keeps them: 50 reference rewards and 2 completions a prompt. Every way reads it and
computes the share of references at or below each reward; `floor` reads the two columns and does nothing. All answers are compared.
`stage` is the pipeline's own: it starts from completion-level reward parts in a store, and ends with committed, validated, checksummed
quantile parts (sorted references, quantiles with bounds, moments). Medians of interleaved runs, each after an untimed one. `--scaling` takes 1e5 to 1e7 completions
through the quantiles and the shards stage, each size in a process of its own, and reports time and peak memory. The reference model
is a Llama of a few thousand weights, so what is seen is the stages' own work; two completions of each prompt are trained on.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qrpo.method.quantiles import quantile_rewards
from qrpo.tiny import build_tiny_model
from storage import PartKey, Store
from tasks.config import PipelineConfig, parse_config
from tasks.plan import PartPlan
from tasks.stages import quantiles, shards
from tasks.work import Work

N, K = 50, 2
TOKENS = 8  # of a completion
INPUTS = ("prompts", "completions", "rewards")
PART = 4096  # prompts in a part of the stage


def write_lists(path: Path, prompts: int) -> None:
    """The research code's layout: one row a prompt, rewards in lists."""
    rng = np.random.default_rng(0)

    def column(width: int) -> pa.Array:
        values = pa.array(rng.normal(size=prompts * width).astype(np.float32))
        return pa.ListArray.from_arrays(pa.array(np.arange(prompts + 1, dtype=np.int32) * width), values)

    pq.write_table(pa.table({"ref_rewards": column(N), "rewards": column(K)}), path)


def floor(path: Path) -> None:
    """Read both columns."""
    pq.read_table(path)


def ours(path: Path) -> np.ndarray:
    """`quantile_rewards` on the columns' own buffers."""
    table = pq.read_table(path).combine_chunks()
    columns = {name: table[name].chunk(0) for name in ("ref_rewards", "rewards")}
    return quantile_rewards(
        columns["rewards"].flatten().to_numpy(),
        columns["ref_rewards"].flatten().to_numpy(),
        offsets=columns["rewards"].offsets.to_numpy(),
        ref_offsets=columns["ref_rewards"].offsets.to_numpy(),
    )


def with_polars(path: Path) -> np.ndarray:
    """Explode both sides' completions, compare list elements."""
    import polars as pl

    frame = pl.read_parquet(path)
    columns = [
        frame.select(
            (pl.col("ref_rewards").list.eval(pl.element()) - pl.col("rewards").list.get(k))
            .list.eval(pl.element() <= 0)
            .list.mean()
        ).to_series()
        for k in range(K)
    ]
    return np.stack([column.to_numpy() for column in columns], axis=1).ravel()


def with_duckdb(path: Path) -> np.ndarray:
    """List functions of SQL."""
    import duckdb

    shares = ", ".join(
        f"len(list_filter(ref_rewards, lambda s: s <= rewards[{k + 1}])) / len(ref_rewards) AS q{k}"
        for k in range(K)
    )
    result = duckdb.sql(f"SELECT {shares} FROM read_parquet('{path}')").fetchnumpy()
    return np.stack([result[f"q{k}"] for k in range(K)], axis=1).ravel()


def with_datasets_batched(path: Path) -> np.ndarray:
    """datasets.map over batches, NumPy inside."""
    return _datasets(path, batched=True)


def with_datasets_rows(path: Path) -> np.ndarray:
    """datasets.map row by row, as the research code does it."""
    return _datasets(path, batched=False)


def _datasets(path: Path, *, batched: bool) -> np.ndarray:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset(pq.read_table(path))

    def rows(batch: dict[str, Any]) -> dict[str, Any]:
        references, rewards = np.asarray(batch["ref_rewards"]), np.asarray(batch["rewards"])
        return {"q": (references[:, None, :] <= rewards[:, :, None]).mean(-1)}

    def row(item: dict[str, Any]) -> dict[str, Any]:
        references = np.asarray(item["ref_rewards"])
        return {"q": [float((references <= reward).mean()) for reward in item["rewards"]]}

    mapped = data.map(
        rows if batched else row, batched=batched, keep_in_memory=True, load_from_cache_file=False
    )
    return np.asarray(mapped.data["q"].combine_chunks().flatten().to_numpy())


def write_parts(store: Store, completions: int) -> list[dict[str, PartPlan]]:
    """Prompts, completions and rewards parts as the stages before would leave them; the quantile and shard parts to make of them."""
    rng = np.random.default_rng(0)
    plans = []
    prompts = completions // N
    for start in range(0, prompts, PART):
        ids = [f"{i:032x}" for i in range(start, min(start + PART, prompts))]
        name = f"{start:08d}"
        keys = {stage: PartKey(stage, "bench", name) for stage in (*INPUTS, "quantiles", "shards")}
        message = [{"role": "user", "content": "what next?"}]
        constant = {
            "messages": message,
            "split": "train",
            "source": "bench",
            "offline_completions": [],
            "metadata": "{}",
        }
        rows = [{"prompt_id": prompt_id, **constant, "conversational": False} for prompt_id in ids]
        store.commit_part(keys["prompts"], pa.Table.from_pylist(rows))
        count = len(ids) * N
        each = {
            "prompt_id": np.repeat(ids, N),
            "sample_index": np.tile(np.arange(N, dtype=np.int32), len(ids)),
            "origin": ["reference"] * count,
        }
        offsets = pa.array(np.arange(count + 1, dtype=np.int32) * TOKENS)
        tokens = pa.array(rng.integers(6, 256, size=count * TOKENS).astype(np.int32))
        sampled = {
            "text": ["said"] * count,
            "token_ids": pa.ListArray.from_arrays(offsets, tokens),
            "finish_reason": ["length"] * count,
            "sampled_logprob": rng.normal(size=count).astype(np.float32),
        }
        store.commit_part(keys["completions"], pa.table(each | sampled))
        scored = {
            "reward": rng.normal(size=count).astype(np.float32),
            "components": pa.nulls(count),
            "error": pa.nulls(count, pa.string()),
        }
        store.commit_part(keys["rewards"], pa.table(each | scored))
        common = {"prompts": name, "split": "train"}
        plans.append(
            {
                "quantiles": PartPlan(keys["quantiles"], (keys["prompts"], keys["rewards"]), common),
                "shards": PartPlan(
                    keys["shards"], (keys["prompts"], keys["quantiles"], keys["completions"]), common
                ),
            }
        )
    return plans


def stage(name: str, store: Store, plans: list[dict[str, PartPlan]], config: PipelineConfig) -> None:
    """The pipeline's stage: read, compute, validate, commit every part."""
    for plan in plans:
        store.discard_part(plan[name].key)
    compute = {"quantiles": quantiles.compute, "shards": shards.compute}[name]
    for _ in compute(Work(name, config, store.url, tuple(plan[name] for plan in plans))):
        pass


def pipeline_config(model: str = "org/none") -> PipelineConfig:
    """A configuration whose only settings that matter here are the number of training completions and the model."""
    return parse_config(
        {
            "prompts": {"source": "none"},
            "reference": {"model": {"path": model}},
            "completions": {"num_ref": N},
            "rewards": [{"kind": "function", "function": "none.py:none"}],
            "quantiles": {"num_completions": K},
        }
    )


def compare(prompts: int, runs: int) -> dict[str, Any]:
    """All ways on the same numbers, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lists.parquet"
        write_lists(path, prompts)
        store, config = Store(Path(folder) / "store"), pipeline_config()
        plans = write_parts(store, prompts * N)
        ways: dict[str, Callable[[], Any]] = {
            "floor": lambda: floor(path),
            "ours": lambda: ours(path),
            "polars": lambda: with_polars(path),
            "duckdb": lambda: with_duckdb(path),
            "datasets.map batched": lambda: with_datasets_batched(path),
            "stage": lambda: stage("quantiles", store, plans, config),
        }
        reference = ours(path)
        for name in ("polars", "duckdb", "datasets.map batched"):
            assert np.allclose(ways[name](), reference, atol=1e-6), name
        seconds: dict[str, list[float]] = {name: [] for name in (*ways, "datasets.map per row")}
        for run in range(runs):
            for name, way in ways.items():
                way()  # untimed: what ran before leaves caches and the allocator in a state of its own
                seconds[name].append(_timed(way))
            if run == 0:  # minutes each: once is enough to place it
                seconds["datasets.map per row"].append(_timed(lambda: with_datasets_rows(path)))
    base = statistics.median(seconds["floor"])
    return {
        "prompts": prompts,
        "references": N,
        "completions": K,
        "seconds": {
            name: {
                "median": statistics.median(times),
                "min": min(times),
                "max": max(times),
                "times_floor": statistics.median(times) / base,
            }
            for name, times in seconds.items()
        },
    }


def scaling() -> list[dict[str, Any]]:
    """The stage from 1e5 to 1e7 completions, each size in a process of its own."""
    command = [sys.executable, __file__, "--one-size"]
    return [
        json.loads(subprocess.run([*command, str(size)], check=True, capture_output=True).stdout)
        for size in (10**5, 10**6, 10**7)
    ]


def one_size(completions: int) -> dict[str, Any]:
    """Seconds and peak memory of both stages over so many completions."""
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder) / "model", ["what next?"], hidden_size=32, heads=1, layers=1)
        store, config = Store(Path(folder) / "store"), pipeline_config(str(Path(folder) / "model"))
        plans = write_parts(store, completions)
        written = _peak_mib()
        seconds = {
            name: _timed(lambda name=name: stage(name, store, plans, config))
            for name in ("quantiles", "shards")
        }
    return {
        "completions": completions,
        "trained_on": completions // N * K,
        "seconds": seconds,
        "microseconds_per_completion": {name: 1e6 * taken / completions for name, taken in seconds.items()},
        "peak_mib": _peak_mib(),
        "peak_mib_after_writing_inputs": written,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _timed(way: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def main() -> None:
    """Print, and with --out write, the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--one-size", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one_size:
        result: Any = one_size(arguments.one_size)
    else:
        result = scaling() if arguments.scaling else compare(arguments.prompts, arguments.runs)
    text = json.dumps(result, indent=None if arguments.one_size else 2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
