"""`qrpo inspect` over an artifact of ten million rows, the start of the process included, beside DuckDB and Polars on the same files.

    python benchmarks/inspection.py [--rows 10000000] [--runs 5] [--store FOLDER] [--out inspection.json]

The store is laid out as the pipeline leaves it with its defaults: 256 prompts a part, 50 completions a prompt in blocks of 16, so that
ten million completions lie in 3,128 files; everything is committed through the store. `--store` keeps it for the next time.
Every way runs as a process of its own, once untimed, then interleaved; wall and CPU time are medians. `imports` starts the command with
nothing to answer (`qrpo inspect --help`): what is above it is the question's own cost. Files are in the page cache.
DuckDB and Polars answer the narrowest form of the first question, in the way of a notebook: rows, mean, extremes and quartiles of one
column (no schema, nulls, histogram, conversations or checks of sizes); the condition and the order are asked of all.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage import PartKey, Store, manifest_of

N, BLOCK, PART = 50, 16, 256  # completions a prompt, in one part, prompts in a part
SPEECH = "the sum of two numbers is found by adding one after another until none is left over so answer"
RUN = "big"


def write_store(store: Store, rows: int) -> None:
    """Prompts, completions and rewards as their stages leave them, under the run `big`."""
    rng = np.random.default_rng(0)
    texts = pa.array([" ".join(rng.choice(SPEECH.split(), size=rng.integers(4, 40))) for _ in range(4096)])
    records: dict[str, list[Any]] = {"prompts": [], "completions": [], "rewards": []}
    for start in range(0, rows // N, PART):
        ids = [
            f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}"
            for number in range(start, min(start + PART, rows // N))
        ]
        prompts = store.commit_part(PartKey("prompts", "bench", f"{start:08d}"), _prompts(ids))
        records["prompts"].append(prompts)
        for first in range(0, N, BLOCK):
            samples = np.arange(first, min(first + BLOCK, N), dtype=np.int32)
            count = len(ids) * len(samples)
            key = {
                "prompt_id": np.repeat(ids, len(samples)),
                "sample_index": np.tile(samples, len(ids)),
                "origin": ["reference"] * count,
            }
            lengths = rng.integers(4, 40, size=count)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            tokens = pa.array(rng.integers(0, 32_000, size=int(lengths.sum()), dtype=np.int32))
            said = {
                "text": texts.take(pa.array(rng.integers(0, len(texts), size=count))),
                "token_ids": pa.ListArray.from_arrays(offsets, tokens),
                "finish_reason": np.where(lengths > 35, "length", "stop"),
                "sampled_logprob": rng.normal(-30, 5, size=count).astype(np.float32),
            }
            reward = rng.normal(size=count).astype(np.float32)
            scored = {"reward": reward, "components": pa.nulls(count), "error": pa.nulls(count, pa.string())}
            name = f"{start:08d}-{first:02d}"
            parents = {prompts.fingerprint: prompts.digest}
            completions = store.commit_part(
                PartKey("completions", "bench", name), pa.table(key | said), parents=parents
            )
            parents = {completions.fingerprint: completions.digest}
            rewards = store.commit_part(
                PartKey("rewards", "bench", f"r{name}"), pa.table(key | scored), parents=parents
            )
            records["completions"].append(completions)
            records["rewards"].append(rewards)
    above: dict[str, str] = {}
    stages = {}
    for stage, parts in records.items():
        manifest = store.commit_manifest(manifest_of(stage, "bench", parts, parents=above))
        above = {stage: manifest.fingerprint}
        stages[stage] = {"fingerprint": manifest.fingerprint}
    store.write_run(RUN, {"stages": stages})


def _prompts(ids: list[str]) -> pa.Table:
    constant = {
        "split": "train",
        "source": "bench",
        "offline_completions": [],
        "metadata": "{}",
        "conversational": False,
    }
    rows = [
        {
            "prompt_id": prompt_id,
            "messages": [{"role": "user", "content": f"What is {prompt_id[:6]}?"}],
            **constant,
        }
        for prompt_id in ids
    ]
    return pa.Table.from_pylist(rows)


def ways(store: str, prompt_id: str) -> dict[str, list[str]]:
    """What is run: name -> command."""
    qrpo = [str(Path(sys.executable).with_name("qrpo"))]
    look = [*qrpo, "inspect", RUN]
    files = f"{store}/parts/rewards/bench/*.parquet"
    duckdb = f"import duckdb; print(duckdb.sql(\"SELECT {{}} FROM read_parquet('{files}') {{}}\").fetchall())"
    polars = f"import polars as pl; r = pl.scan_parquet('{files}'); print({{}})"
    quartiles = "count(*), avg(reward), min(reward), max(reward), quantile_cont(reward, [0.25, 0.5, 0.75])"
    c = "pl.col('reward')"
    numbers = "pl.len(), " + ", ".join(f"{c}.{name}().alias('{name}')" for name in ("mean", "min", "max"))
    numbers += ", " + ", ".join(f"{c}.quantile({q}).alias('{q}')" for q in (0.25, 0.5, 0.75))
    python = [sys.executable, "-c"]
    return {
        "imports": [*look, "rewards", "--help"],
        "first answer, rewards": [*look, "rewards", "--store", store],
        "first answer, completions": [*look, "completions", "--store", store],
        "a sample": [*look, "completions", "--sample", "1", "--columns", "text", "--store", store],
        "a condition": [*look, "rewards", "--where", "reward > 4.5", "--columns", "reward", "--store", store],
        "an order": [*look, "rewards", "--sort=-reward", "--columns", "reward", "--store", store],
        "one prompt": [*look, "rewards", "--prompt-id", prompt_id, "--store", store],
        "DuckDB, numbers of one column": [*python, duckdb.format(quartiles, "")],
        "DuckDB, a condition": [*python, duckdb.format("reward", "WHERE reward > 4.5 LIMIT 5")],
        "DuckDB, an order": [*python, duckdb.format("reward", "ORDER BY reward DESC LIMIT 5")],
        "Polars, numbers of one column": [*python, polars.format(f"r.select({numbers}).collect()")],
        "Polars, a condition": [
            *python,
            polars.format("r.filter(pl.col('reward') > 4.5).select('reward').head(5).collect()"),
        ],
        "Polars, an order": [*python, polars.format("r.select('reward').top_k(5, by='reward').collect()")],
    }


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "COLUMNS": "100"})
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(store: str, rows: int, runs: int) -> dict[str, Any]:
    """Medians and spread of every way."""
    opened = Store(store)
    if opened.run(RUN) is None:
        write_store(opened, rows)
    run = opened.run(RUN) or {}
    manifests = {
        stage: opened.manifest(stage, entry["fingerprint"]) for stage, entry in run["stages"].items()
    }
    sizes = {
        stage: {"rows": manifest.rows, "parts": len(manifest.parts), "bytes": manifest.bytes}
        for stage, manifest in manifests.items()
        if manifest is not None
    }
    prompt_id = opened.read_part(manifests["prompts"].parts[-1], ["prompt_id"])["prompt_id"][0].as_py()  # type: ignore[union-attr]
    commands = ways(store, prompt_id)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for run_number in range(runs + 1):
        for name, command in commands.items():
            seconds = timed(command)
            if run_number:  # the first fills the page cache
                taken[name].append(seconds)
    return {
        "cpus": os.cpu_count(),
        "artifacts": sizes,
        "runs": runs,
        "seconds": {
            name: {
                "wall": statistics.median(wall for wall, _ in times),
                "least": min(wall for wall, _ in times),
                "most": max(wall for wall, _ in times),
                "cpu": statistics.median(cpu for _, cpu in times),
            }
            for name, times in taken.items()
        },
    }


def main() -> None:
    """Print, and with --out write, the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--store", help="keep the store in this folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.store or folder, arguments.rows, arguments.runs)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
