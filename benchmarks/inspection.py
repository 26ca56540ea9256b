"""`qrpo inspect` over an artifact of ten million rows, process start included, beside DuckDB and
Polars on the same files.

    python -m benchmarks.inspection [--rows 10000000] [--rounds 5] [--store FOLDER] [--out FILE]

The store has the layout that the pipeline's defaults give: 256 prompts in a part, 50 completions of
each prompt in blocks of 16, so that ten million completions are in 3,128 files; everything is
committed through the store. `--store` keeps it for the next time. Every way runs in its own
process. `imports` starts the command with nothing to answer (`qrpo inspect --help`): what exceeds
it is the cost of the question. Files are in the page cache. DuckDB and Polars answer the narrowest
form of the first question, as in a notebook: rows, mean, extremes and quartiles of one column (no
schema, nulls, histogram, conversations or size checks). All answer the condition and the order.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import store_data
from benchmarks.harness import Case, command, command_line, compare, report
from storage import Store, manifest_of

NUM_REF, BLOCK, PART_PROMPTS = 50, 16, 256
SPEECH = "the sum of two numbers is found by adding one after another until none remains so answer"
RUN = "big"


def write_store(store: Store, rows: int) -> None:
    """Prompts, completions and rewards as their stages leave them, under the run `big`."""
    rng = np.random.default_rng(0)
    texts = pa.array([" ".join(rng.choice(SPEECH.split(), size=rng.integers(4, 40))) for _ in range(4096)])
    records: dict[str, list[Any]] = {"prompts": [], "completions": [], "rewards": []}
    prompts = rows // NUM_REF
    for start in range(0, prompts, PART_PROMPTS):
        numbers = range(start, min(start + PART_PROMPTS, prompts))
        ids = [f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}" for number in numbers]
        table = store_data.prompts_table(ids, [f"What is {prompt_id[:6]}?" for prompt_id in ids])
        above = store.commit_part(store_data.part_keys(["prompts"], f"{start:08d}")["prompts"], table)
        records["prompts"].append(above)
        for first in range(0, NUM_REF, BLOCK):
            row_keys = store_data.row_keys(ids, np.arange(first, min(first + BLOCK, NUM_REF)))
            lengths = rng.integers(4, 40, size=len(row_keys["origin"]))
            said = texts.take(pa.array(rng.integers(0, len(texts), size=len(lengths))))
            parent = above
            for stage, table in (
                ("completions", store_data.completions_table(row_keys, said, lengths, rng)),
                ("rewards", store_data.rewards_table(row_keys, rng)),
            ):
                key = store_data.part_keys([stage], f"{stage}-{start:08d}-{first:02d}")[stage]
                parent = store.commit_part(key, table, parents={parent.fingerprint: parent.digest})
                records[stage].append(parent)
    stages: dict[str, dict[str, str]] = {}
    parents: dict[str, str] = {}
    for stage, parts in records.items():
        manifest = store.commit_manifest(manifest_of(stage, "benchmark", parts, parents=parents))
        parents = {stage: manifest.fingerprint}
        stages[stage] = {"fingerprint": manifest.fingerprint}
    store.write_run(RUN, {"stages": stages})


def commands(store: str, prompt_id: str) -> dict[str, dict[str, list[str]]]:
    """Question -> way -> command."""

    def inspect(stage: str, *words: str) -> list[str]:
        qrpo = str(Path(sys.executable).with_name("qrpo"))
        return [qrpo, "inspect", RUN, stage, *words, "--store", store]

    files = f"{store}/parts/rewards/benchmark/*.parquet"

    def duckdb(columns: str, rest: str = "") -> list[str]:
        query = f"SELECT {columns} FROM read_parquet('{files}') {rest}"
        return [sys.executable, "-c", f"import duckdb; print(duckdb.sql({query!r}).fetchall())"]

    def polars(query: str) -> list[str]:
        return [
            sys.executable,
            "-c",
            f"import polars as pl; rows = pl.scan_parquet('{files}'); print({query}.collect())",
        ]

    quartiles = "count(*), avg(reward), min(reward), max(reward), quantile_cont(reward, [0.25, 0.5, 0.75])"
    reward = "pl.col('reward')"
    numbers = [f"{reward}.{name}().alias('{name}')" for name in ("mean", "min", "max")]
    numbers += [f"{reward}.quantile({q}).alias('{q}')" for q in (0.25, 0.5, 0.75)]
    return {
        "start and imports": {"qrpo inspect": inspect("rewards", "--help")},
        "first answer, rewards": {
            "qrpo inspect": inspect("rewards"),
            "DuckDB, one column": duckdb(quartiles),
            "Polars, one column": polars(f"rows.select(pl.len(), {', '.join(numbers)})"),
        },
        "first answer, completions": {"qrpo inspect": inspect("completions")},
        "random completions": {"qrpo inspect": inspect("completions", "--sample", "1", "--columns", "text")},
        "one prompt through every stage": {"qrpo inspect": inspect("rewards", "--prompt-id", prompt_id)},
        "--where": {
            "qrpo inspect": inspect("rewards", "--where", "reward > 4.5", "--columns", "reward"),
            "DuckDB, one column": duckdb("reward", "WHERE reward > 4.5 LIMIT 5"),
            "Polars, one column": polars(f"rows.filter({reward} > 4.5).select('reward').head(5)"),
        },
        "--sort": {
            "qrpo inspect": inspect("rewards", "--sort=-reward", "--columns", "reward"),
            "DuckDB, one column": duckdb("reward", "ORDER BY reward DESC LIMIT 5"),
            "Polars, one column": polars("rows.select('reward').top_k(5, by='reward')"),
        },
    }


def measure(folder: str, rows: int, rounds: int) -> list[Case]:
    """The sizes of the artifacts, then every question."""
    store = Store(folder)
    if store.run(RUN) is None:
        write_store(store, rows)
    run = store.run(RUN) or {}
    sizes: Case = {}
    for stage, entry in run["stages"].items():
        manifest = store.manifest(stage, entry["fingerprint"])
        assert manifest is not None
        sizes[stage] = {"rows": manifest.rows, "parts": len(manifest.parts), "bytes": manifest.bytes}
        if stage == "prompts":
            prompt_id = store.read_part(manifest.parts[-1], ["prompt_id"])["prompt_id"][0].as_py()
    cases = [sizes]
    for question, by_way in commands(folder, prompt_id).items():
        ways = {name: command(*words, COLUMNS="100") for name, words in by_way.items()}
        cases.append({"question": question, "ways": compare(ways, rounds)})
    return cases


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--store", help="keep the store in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(options, measure(options.store or folder, options.rows, options.rounds))
