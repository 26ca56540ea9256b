import resource
from pathlib import Path

import pytest

from tests.support.storage import run_code

CODE = """
import resource, sys
import numpy as np, pyarrow as pa, storage
from tasks.stages.completions import TABLE
rows, url = int(sys.argv[1]), sys.argv[2]
STEP = 50_000
def tables():
    for first in range(0, rows, STEP):
        yield pa.table({
            "prompt_id": pa.array([f"prompt-{row // 50:016d}" for row in range(first, first + STEP)]),
            "sample_index": pa.array(np.arange(first, first + STEP, dtype=np.int32) % 50),
            "origin": pa.array(["reference"] * STEP),
            "text": pa.array(["x" * 200] * STEP),
            "token_ids": pa.ListArray.from_arrays(
                pa.array(np.arange(STEP + 1, dtype=np.int32) * 50), pa.array(np.arange(STEP * 50, dtype=np.int32))),
            "finish_reason": pa.nulls(STEP),
            "sampled_logprob": pa.nulls(STEP),
            "prompt_token_ids": pa.nulls(STEP),
        })
store = storage.Store(url)
warm = store.commit_part(storage.PartKey("completions", "family", "warm"), next(tables()), table=TABLE)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
record = store.commit_part(storage.PartKey("completions", "family", "big"), tables(), table=TABLE)
assert record.rows == rows
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def grown_by(rows: int, folder: Path) -> int:
    """MiB by which the peak memory of a process grows while it streams a part of that many rows."""
    return int(run_code(CODE, rows, folder))


@pytest.mark.slow
def test_a_part_is_streamed_in_memory_that_does_not_grow_with_it(tmp_path: Path) -> None:
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    small = grown_by(200_000, tmp_path / "small")  # about 80 MB of rows
    large = grown_by(2_000_000, tmp_path / "large")  # ten times that
    assert large < small + 100
    assert large < 400
