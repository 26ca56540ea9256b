"""Keys and tables for the tests of the store, which knows no stage."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from storage import PartKey, PartRecord, Store, fingerprint, rejects_table
from storage.checks import at_least, finite, one_of
from storage.reader import PIECE
from storage.table import Table, column

T = TypeVar("T")

SCORES = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column("sample_index", pa.int32()),
            column("origin", pa.string()),
            column("reward", pa.float32(), null=True),
            column(
                "components",
                pa.list_(pa.struct([column("name", pa.string()), column("value", pa.float32(), null=True)])),
                null=True,
            ),
            column("error", pa.string(), null=True),
        ]
    ),
    key=("prompt_id", "origin", "sample_index"),
    checks=(one_of("origin", ("reference", "offline")), at_least("sample_index", 0), finite("reward")),
)
"""One row per completion."""

SHARDS = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column("prompt_token_ids", pa.list_(pa.int32())),
            column("completion_token_ids", pa.list_(pa.list_(pa.int32()))),
            column("sample_index", pa.list_(pa.int32())),
            column("origin", pa.list_(pa.string())),
            column("reward", pa.list_(pa.float32())),
            column("quantile_reward", pa.list_(pa.float32())),
            column("quantile_low", pa.list_(pa.float32())),
            column("quantile_high", pa.list_(pa.float32())),
            column("ref_logprob", pa.list_(pa.float32())),
            column("num_ref", pa.int32()),
            column("ref_mean", pa.float32(), null=True),
            column("ref_std", pa.float32(), null=True),
        ]
    ),
    key=("prompt_id",),
    group_rows=PIECE,
)
"""One row per prompt with lists, and lists of lists, of values per completion."""

REJECT = {"stage": "rewards", "key": "3", "reason": "NaN", "prompt_id": "prompt-3"}
REJECTS = rejects_table([REJECT])


def part_key(stage: str, number: int = 0, family: str = "family") -> PartKey:
    """The key of a part; the same number gives the same key."""
    return PartKey(stage, fingerprint([stage, family]), fingerprint([stage, family, number]))


def scores(rows: int = 10, seed: int = 0) -> pa.Table:
    """Rows of `SCORES`."""
    rng = np.random.default_rng(seed)
    columns = {
        "prompt_id": [f"prompt-{seed}-{row // 2}" for row in range(rows)],
        "sample_index": [row % 2 for row in range(rows)],
        "origin": ["reference"] * rows,
        "reward": rng.normal(size=rows).astype(np.float32),
        "components": [[{"name": "length", "value": 1.0}]] * rows,
        "error": [None] * rows,
    }
    return pa.table(columns, schema=SCORES.schema)


def shards(rows: int = 10, first: int = 0, tokens: int = 7, ragged: bool = True) -> pa.Table:
    """Rows of `SHARDS`; the token ids of row i say i."""
    made: list[dict[str, Any]] = []
    for row in range(first, first + rows):
        completions = 1 + row % 3 if ragged else 2
        values = [np.float32((row % 97) / 97)] * completions
        made.append(
            {
                "prompt_id": f"prompt-{row}",
                "prompt_token_ids": [row] * (1 + row % 5),
                "completion_token_ids": [[row + k] * (tokens + k) for k in range(completions)],
                "sample_index": list(range(completions)),
                "origin": ["offline"] * completions,
                "reward": [float(row)] * completions,
                "quantile_reward": values,
                "quantile_low": values,
                "quantile_high": values,
                "ref_logprob": [-float(row)] * completions,
                "num_ref": 10,
                "ref_mean": 0.5,
                "ref_std": None,
            }
        )
    return pa.Table.from_pylist(made, schema=SHARDS.schema)


def commit_scores(
    store: Store, count: int, rows: int = 10, rejected: Callable[[int], bool] = bool
) -> list[PartRecord]:
    """Commit parts 0, 1, ... with scores of seed 0, 1, ...; those that are `rejected` have one reject."""
    return [
        store.commit_part(part_key("rewards", n), scores(rows, n), rejects=REJECTS if rejected(n) else None)
        for n in range(count)
    ]


def at_once(count: int, act: Callable[[int], T]) -> list[T]:
    """What act(0), act(1), ... return, called in threads that start together."""
    barrier = threading.Barrier(count)

    def run(number: int) -> T:
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def run_code(code: str, *args: object) -> str:
    """What a Python process prints that runs this code."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
