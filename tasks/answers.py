"""Answers that cost money, in the store: `answers/<group>/<digest>.parquet`, so that no run asks
twice.

Each file holds some answers and is never changed: two columns, `key` and `answer` (JSON). A damaged
file costs its answers, not the run. They belong to no run, so `qrpo gc` leaves them; deleting the
folder only means asking again.
"""

import hashlib
import logging
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from storage import Store

log = logging.getLogger("qrpo")


class StoredAnswers:
    """The store as the rewards' `Answers`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def load(self, group: str) -> dict[str, str]:
        """All answers of a group, by key."""
        answers: dict[str, str] = {}
        for name, data in self._store.files.read_many(self._store.list(f"answers/{group}")).items():
            if name != _key(group, data) and name != _key(group, data := self._store.read_bytes(name)):
                log.warning("%s was altered and is passed over", self._store.url_of(name))
                continue
            table = pq.read_table(pa.BufferReader(data), columns=["key", "answer"])
            answers |= zip(table["key"].to_pylist(), table["answer"].to_pylist(), strict=True)
        return answers

    def keep(self, group: str, answers: Mapping[str, str]) -> None:
        """Write one more file."""
        columns = {"key": list(answers), "answer": list(answers.values())}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        self._store.write_bytes(_key(group, data), data)


def _key(group: str, data: bytes) -> str:
    return f"answers/{group}/{hashlib.sha256(data).hexdigest()[:32]}.parquet"
