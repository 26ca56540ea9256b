"""Tables for the tests of the store, which knows no stage."""

import pyarrow as pa

from storage.checks import at_least, finite, one_of
from storage.reader import PIECE
from storage.table import Table, column

__all__ = ["SCORES", "SHARDS"]

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
