"""Quantile rewards: the computation in memory and from Parquet, and the stages around it.

    python -m benchmarks.quantiles memory  [--out quantiles_throughput.json]
    python -m benchmarks.quantiles parquet [--out quantiles_stage.json]
    python -m benchmarks.quantiles scaling [--out quantiles_scaling.json]

`memory`: `quantile_rewards` beside NumPy broadcasting, one sort of all (prompt, reward) keys with
searchsorted, and SciPy, on float32 arrays as Arrow would give them. SciPy works prompt by prompt,
so it computes the first 2,000 prompts and its times are scaled up.

`parquet`: one file of list columns, as research code keeps them, 50 reference rewards and 2
completions for each prompt. Every way reads it and computes the share of references at or below
each reward; `floor` only reads the two columns. `stage` is the pipeline's
stage: it starts from reward parts with a row for each completion, and ends with committed,
validated, checksummed quantile parts.

`scaling`: the quantiles and shards stages over 1e5 to 1e7 completions, each size in its own
process. The reference model is a Llama of a few thousand weights, so that the stages' own work is
measured; two completions of each prompt are trained on.

All answers are compared with each other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import store_data
from benchmarks.harness import Case, clocks, command_line, compare, peak_mib, report, since, timed
from qrpo.method.quantiles import quantile_bounds, quantile_rewards
from qrpo.tiny import build_tiny_model
from storage import PartKey, Store
from tasks.plan import PartPlan
from tasks.stages import quantiles, shards

NUM_REF, NUM_COMPLETIONS = 50, 2
SCIPY_PROMPTS = 2_000
COMPLETION_TOKENS, PART_PROMPTS = 8, 4096


# In memory. Each way gets rewards (P, K), the references of all prompts end to end, and the offsets
# (P + 1) of each prompt's.


def ours(rewards: np.ndarray, references: np.ndarray, ref_offsets: np.ndarray) -> np.ndarray:
    """The project's function, on a matrix where every prompt has the same number of references."""
    if len(np.unique(np.diff(ref_offsets))) == 1:
        return quantile_rewards(rewards, references.reshape(len(rewards), -1))
    return quantile_rewards(rewards, references, ref_offsets=ref_offsets)


def broadcasting(rewards: np.ndarray, references: np.ndarray, ref_offsets: np.ndarray) -> np.ndarray:
    """All (P, K, N) comparisons at once; the number of references must be the same for every
    prompt."""
    return (references.reshape(len(rewards), 1, -1) <= rewards[:, :, None]).mean(-1)


def sorting(rewards: np.ndarray, references: np.ndarray, ref_offsets: np.ndarray) -> np.ndarray:
    """(prompt, reward) packed into one 64-bit key, sorted once, searched once. A sort of each row
    is faster."""

    def ordered(values: np.ndarray) -> np.ndarray:
        bits = values.view(np.uint32)
        return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))

    prompt = np.arange(len(rewards), dtype=np.uint64) << np.uint64(32)
    keys = np.sort(np.repeat(prompt, np.diff(ref_offsets)) | ordered(references))
    found = np.searchsorted(keys, (prompt[:, None] | ordered(rewards)).ravel(), side="right")
    return (found.reshape(rewards.shape) - ref_offsets[:-1, None]) / np.diff(ref_offsets)[:, None]


def with_scipy(rewards: np.ndarray, references: np.ndarray, ref_offsets: np.ndarray) -> np.ndarray:
    """One call of percentileofscore for each of the first prompts."""
    from scipy import stats

    rows = zip(rewards[:SCIPY_PROMPTS], ref_offsets[:-1], ref_offsets[1:], strict=False)
    return np.array([stats.percentileofscore(references[a:b], r, kind="weak") / 100 for r, a, b in rows])


def in_memory(lengths: np.ndarray, completions: int, rounds: int) -> Case:
    """One size; `lengths` (P,) are the numbers of references."""
    rng = np.random.default_rng(0)
    ref_offsets = np.concatenate([[0], np.cumsum(lengths)])
    references = rng.normal(size=ref_offsets[-1]).astype(np.float32)
    rewards = rng.normal(size=(len(lengths), completions)).astype(np.float32)
    functions = {"quantile_rewards": ours, "sort and searchsorted": sorting, "SciPy": with_scipy}
    if lengths.min() == lengths.max():
        functions["NumPy broadcasting"] = broadcasting
    expected = ours(rewards, references, ref_offsets)

    def check(answer: np.ndarray) -> None:
        np.testing.assert_allclose(answer, expected[: len(answer)], atol=1e-6)

    ways = {n: timed(partial(f, rewards, references, ref_offsets), check) for n, f in functions.items()}
    scipy, scale = ways["SciPy"], max(1.0, len(lengths) / SCIPY_PROMPTS)
    ways["SciPy"] = lambda: {name: seconds * scale for name, seconds in scipy().items()}
    return {
        "prompts": len(lengths),
        "references": [int(lengths.min()), int(lengths.max())],
        "completions": completions,
        "comparisons": int(ref_offsets[-1]) * completions,
        "ways": compare(ways, rounds, "quantile_rewards"),
    }


def memory(options: argparse.Namespace) -> list[Case]:
    """All sizes, and the bounds."""
    prompts, rng = options.size, np.random.default_rng(1)
    sizes = (
        (np.full(prompts, 50), 2),
        (rng.integers(10, 91, prompts), 2),
        (np.full(10 * prompts, 50), 2),
        (np.full(2 * prompts // 5, 50), 50),
    )
    cases = [in_memory(lengths, completions, options.rounds) for lengths, completions in sizes]
    q = np.resize(np.arange(51, dtype=np.float32) / 50, (prompts, 1))
    bounds = {"Clopper-Pearson bounds": timed(lambda: quantile_bounds(q, np.full(prompts, 50)))}
    return [*cases, {"prompts": prompts, "references": 50, "ways": compare(bounds, options.rounds)}]


# From Parquet. Each way gets the path of a file with the list columns `ref_rewards` and `rewards`.


def write_lists(path: Path, prompts: int) -> None:
    """One row for each prompt, rewards in lists."""
    rng = np.random.default_rng(0)

    def column(width: int) -> pa.Array:
        values = pa.array(rng.normal(size=prompts * width).astype(np.float32))
        return pa.ListArray.from_arrays(pa.array(np.arange(prompts + 1, dtype=np.int32) * width), values)

    pq.write_table(pa.table({"ref_rewards": column(NUM_REF), "rewards": column(NUM_COMPLETIONS)}), path)


def from_columns(path: Path) -> np.ndarray:
    """`quantile_rewards` on the columns' own buffers."""
    table = pq.read_table(path).combine_chunks()
    rewards, references = table["rewards"].chunk(0), table["ref_rewards"].chunk(0)
    return quantile_rewards(
        rewards.flatten().to_numpy(),
        references.flatten().to_numpy(),
        offsets=rewards.offsets.to_numpy(),
        ref_offsets=references.offsets.to_numpy(),
    )


def with_polars(path: Path) -> np.ndarray:
    """Comparisons within list expressions."""
    import polars as pl

    frame = pl.read_parquet(path)
    references = pl.col("ref_rewards").list.eval(pl.element())
    below = [references - pl.col("rewards").list.get(k) for k in range(NUM_COMPLETIONS)]
    columns = [frame.select(gap.list.eval(pl.element() <= 0).list.mean()).to_series() for gap in below]
    return np.stack([column.to_numpy() for column in columns], axis=1).ravel()


def with_duckdb(path: Path) -> np.ndarray:
    """List functions of SQL."""
    import duckdb

    shares = ", ".join(
        f"len(list_filter(ref_rewards, lambda s: s <= rewards[{k + 1}])) / len(ref_rewards) AS q{k}"
        for k in range(NUM_COMPLETIONS)
    )
    result = duckdb.sql(f"SELECT {shares} FROM read_parquet('{path}')").fetchnumpy()
    return np.stack([result[f"q{k}"] for k in range(NUM_COMPLETIONS)], axis=1).ravel()


def with_datasets(path: Path, batched: bool) -> np.ndarray:
    """datasets.map over batches with NumPy, or row by row, as the research code does it."""
    import datasets

    datasets.disable_progress_bars()

    def quantile(rows: dict[str, Any]) -> dict[str, Any]:
        references, rewards = np.asarray(rows["ref_rewards"]), np.asarray(rows["rewards"])
        return {"q": (references[..., None, :] <= rewards[..., :, None]).mean(-1)}

    data = datasets.Dataset(pq.read_table(path))
    mapped = data.map(quantile, batched=batched, keep_in_memory=True, load_from_cache_file=False)
    return np.asarray(mapped.data["q"].combine_chunks().flatten().to_numpy())


def write_parts(store: Store, completions: int) -> dict[str, list[PartPlan]]:
    """Commit prompts, completions and rewards parts; stage -> the parts to compute from them."""
    rng = np.random.default_rng(0)
    plans: dict[str, list[PartPlan]] = {"quantiles": [], "shards": []}
    prompts = completions // NUM_REF
    for start in range(0, prompts, PART_PROMPTS):
        ids = [f"{i:032x}" for i in range(start, min(start + PART_PROMPTS, prompts))]
        stages = ("prompts", "completions", "rewards", "quantiles", "shards")
        keys = store_data.part_keys(stages, f"{start:08d}")
        row_keys = store_data.row_keys(ids, np.arange(NUM_REF))
        texts = pa.array(["said"] * len(row_keys["origin"]))
        lengths = np.full(len(texts), COMPLETION_TOKENS)
        store.commit_part(keys["prompts"], store_data.prompts_table(ids, ["what next?"] * len(ids)))
        store.commit_part(keys["completions"], store_data.completions_table(row_keys, texts, lengths, rng))
        store.commit_part(keys["rewards"], store_data.rewards_table(row_keys, rng))
        inputs: dict[str, tuple[PartKey, ...]] = {
            "quantiles": (keys["prompts"], keys["rewards"]),
            "shards": (keys["prompts"], keys["quantiles"], keys["completions"]),
        }
        for stage, parents in inputs.items():
            part = PartPlan(keys[stage], parents, {"prompts": f"{start:08d}", "split": "train"})
            plans[stage].append(part)
    return plans


def parquet(options: argparse.Namespace) -> list[Case]:
    """All ways on as many rewards."""
    with tempfile.TemporaryDirectory() as folder:
        path, store = Path(folder, "lists.parquet"), Store(Path(folder, "store"))
        write_lists(path, options.size)
        parts = write_parts(store, options.size * NUM_REF)["quantiles"]
        config = store_data.pipeline_config(
            "org/none", NUM_REF, quantiles={"num_completions": NUM_COMPLETIONS}
        )
        expected = from_columns(path)

        def check(answer: np.ndarray) -> None:
            np.testing.assert_allclose(answer, expected, atol=1e-6)

        functions = {
            "quantile_rewards": from_columns,
            "Polars": with_polars,
            "DuckDB": with_duckdb,
            "datasets.map, batched": partial(with_datasets, batched=True),
            "datasets.map, row by row": partial(with_datasets, batched=False),
        }
        ways = {"floor": timed(lambda: pq.read_table(path), warm_up=True)}
        ways["stage"] = timed(lambda: store_data.compute(quantiles, store, parts, config), warm_up=True)
        slow = "datasets.map, row by row"
        for name, function in functions.items():
            ways[name] = timed(partial(function, path), check, warm_up=name != slow)
        found = compare(ways, options.rounds, "floor", untimed=0, once=(slow,))
    return [
        {
            "prompts": options.size,
            "references": NUM_REF,
            "completions": NUM_COMPLETIONS,
            "ways": found,
        }
    ]


def scaling(options: argparse.Namespace) -> list[Case]:
    """Both stages at each size."""
    if options.one:
        print(json.dumps(one_size(options.one)))
        sys.exit()
    words = [sys.executable, "-m", "benchmarks.quantiles", "scaling", "--one"]
    sizes = (options.size, 10 * options.size, 100 * options.size)
    answers = [
        subprocess.run([*words, str(size)], check=True, stdout=subprocess.PIPE).stdout for size in sizes
    ]
    return [json.loads(answer) for answer in answers]


def one_size(completions: int) -> Case:
    """Seconds and peak memory of both stages."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        build_tiny_model(model, ["what next?"], hidden_size=32, heads=1, layers=1)
        store = Store(Path(folder, "store"))
        config = store_data.pipeline_config(model, NUM_REF, quantiles={"num_completions": NUM_COMPLETIONS})
        parts = write_parts(store, completions)
        before, seconds = peak_mib(), {}
        for name, module in (("quantiles", quantiles), ("shards", shards)):
            start = clocks()
            store_data.compute(module, store, parts[name], config)
            seconds[name] = since(start)
    return {
        "completions": completions,
        "trained_on": completions // NUM_REF * NUM_COMPLETIONS,
        "seconds": seconds,
        "peak_mib": peak_mib(),
        "peak_mib_after_writing_inputs": before,
    }


if __name__ == "__main__":
    parser = command_line(__doc__)
    measures = {"memory": memory, "parquet": parquet, "scaling": scaling}
    parser.add_argument("measure", choices=measures)
    parser.add_argument(
        "--size", type=int, default=100_000, help="prompts of the smallest case; for `scaling`, completions"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    report(options, measures[options.measure](options))
