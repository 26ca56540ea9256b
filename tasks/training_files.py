"""Training files: the rows of all shards in an order that depends on the seed and the rows alone,
not on how shards were cut.

Rows are sorted by a hash of seed and prompt and written into files of ROWS_PER_FILE rows, in a
store in the training run's work folder. `ShardReader` then permutes whole files and the rows of a
window, so the order of every epoch depends on seed, epoch and row content only. One pass over the
shards: small next to what the rows cost.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qrpo.seeds import seeded_hash
from storage import PartKey, PartRecord, Store, Table, fingerprint

ROWS_PER_FILE = 1024
"""Part of the order: a change is another order. Also the rows of a row group, which the reader
reads as a whole."""
_BYTES_PER_PASS = 1 << 30  # of compressed shards; their rows take about four times as much memory


def training_files(
    store: Store,
    shards: Sequence[PartRecord],
    table: Table,
    folder: Path,
    seed: int,
    held_out: Callable[[str], bool],
) -> tuple[Store, list[PartRecord], list[PartRecord]]:
    """(store of the files, files to train on, files of rows that `held_out` names by prompt id),
    all in order.

    Files that an earlier attempt wrote are kept. Each file has its rows at once, so a kill leaves
    whole files only.
    """
    files = Store(folder)
    content = [[record.fingerprint, record.digest] for record in shards]
    ids = [store.read_part(record, columns=["prompt_id"])["prompt_id"].to_pylist() for record in shards]
    names = np.array([name for part in ids for name in part], dtype=object)
    order = sorted(range(len(names)), key=lambda row: seeded_hash("training", seed, names[row]))
    kept = [row for row in order if not held_out(names[row])]
    out = [row for row in order if held_out(names[row])]
    wanted = [
        (
            PartKey("training", split, fingerprint([content, seed, number])),
            chosen[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE],
        )
        for split, chosen in (("train", kept), ("held-out", out))
        for number in range(math.ceil(len(chosen) / ROWS_PER_FILE))
    ]
    missing = [(key, rows) for key, rows in wanted if not files.exists(key.table) or files.part(key) is None]
    passes = max(1, math.ceil(sum(record.bytes for record in shards) / _BYTES_PER_PASS))
    size = math.ceil(len(missing) / passes)
    for start in range(0, len(missing), size or 1):
        _write(files, missing[start : start + size], store, shards, table)
    records = files.find_parts([key for key, _ in wanted])
    train = [records[key.fingerprint] for key, _ in wanted if key.family == "train"]
    return files, train, [records[key.fingerprint] for key, _ in wanted if key.family == "held-out"]


def _write(
    files: Store,
    wanted: Sequence[tuple[PartKey, Sequence[int]]],
    store: Store,
    shards: Sequence[PartRecord],
    table: Table,
) -> None:
    """Read the shards once, keep the rows of these files, and write the files."""
    chosen = np.sort(np.concatenate([np.asarray(rows, dtype=np.int64) for _, rows in wanted]))
    found: list[pa.Table] = []
    first = 0
    for record in shards:
        inside = chosen[(chosen >= first) & (chosen < first + record.rows)] - first
        if len(inside):
            found.append(store.read_part(record).take(pa.array(inside)))
        first += record.rows
    rows_of_files = pa.concat_tables(found)
    for key, rows in wanted:
        places: npt.NDArray[np.int64] = np.searchsorted(chosen, np.asarray(rows, dtype=np.int64))
        files.commit_part(key, rows_of_files.take(pa.array(places)), table=table)
