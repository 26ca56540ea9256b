"""What one Prefect task gets: a group of parts of one stage, and how to commit each.

A `Work` can be pickled, so the same group can be computed in this process, in a child process or on
another machine.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from qrpo.processes.preemption import noting_sigterm
from storage import PartKey, PartRecord, Store
from storage.leases import check_claim
from storage.processes import cache_folder
from storage.table import Table, rejects_table
from tasks.checkpoints import clear_checkpoints, fetch_checkpoints, keep_checkpoints
from tasks.plan import PartPlan
from tasks.sections import RunConfig

S = TypeVar("S")


@dataclass(frozen=True)
class Progress:
    """Progress of the current part: `done` of `total` units, and a message."""

    done: float
    total: float
    message: str = ""


@dataclass(frozen=True)
class Work(Generic[S]):
    """Parts of one stage to compute now, with everything that this needs. `S` is the stage's
    `Settings`."""

    stage: str
    settings: S
    run: RunConfig
    run_name: str
    store: Store
    parts: tuple[PartPlan, ...]
    holder: str = ""
    """Who holds the leases of these parts (`Leases.holder`); empty where no other run shares the
    store."""
    read: dict[PartKey, PartRecord] = field(default_factory=dict, repr=False, compare=False)
    """The records that were used: what is computed was made from these bytes, whatever the store
    has later."""

    @property
    def log(self) -> Path:
        """Where child processes write: next to a local store's data, else in the user's cache
        folder."""
        name = f"logs/{self.run_name}/{self.stage}.log"
        path = self.store.local_path(name) or cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def only(self, parts: Sequence[PartPlan]) -> "Work[S]":
        """The same work for fewer parts."""
        return replace(self, parts=tuple(parts))

    def check_lease(self, part: PartPlan) -> None:
        """Raise LeaseLostError where another run has taken over this part. Called before each
        checkpoint and commit."""
        if self.holder:
            check_claim(self.store, part.key, self.holder)

    def folder(self, part: PartPlan) -> Path:
        """The local folder of an unfinished part, for its checkpoints; it survives a kill, and
        belongs to one holder."""
        self.check_lease(part)
        return self.store.work_dir(part.key, self.holder)

    def resume(self, part: PartPlan) -> Path:
        """The part's folder, with the newest checkpoints of the part."""
        folder = self.folder(part)
        fetch_checkpoints(self.store, part.key, folder)
        return folder

    @contextmanager
    def saving(self, part: PartPlan) -> Iterator[None]:
        """Around the writing of a checkpoint: by the holder of the part alone, and into the store
        too."""
        folder = self.folder(part)
        yield
        keep_checkpoints(self.store, part.key, folder)

    def input(self, part: PartPlan, stage: str) -> PartRecord:
        """The record of the one parent part that comes from `stage`."""
        (record,) = self.inputs(part, stage)
        return record

    def inputs(self, part: PartPlan, stage: str) -> list[PartRecord]:
        """The records of the parent parts that come from `stage`, in the plan's order."""
        return self.records([key for key in part.inputs if key.stage == stage])

    def record(self, key: PartKey) -> PartRecord:
        """The record of a part that must be there by now."""
        return self.records([key])[0]

    def records(self, keys: Sequence[PartKey]) -> list[PartRecord]:
        """The records of parts that must be there by now; raises DamagedError."""
        lacking = [key for key in keys if key not in self.read]
        found = self.store.find_parts(lacking, required=True)
        self.read.update((key, found[key.fingerprint]) for key in lacking)
        return [self.read[key] for key in keys]

    def commit(
        self,
        part: PartPlan,
        rows: pa.Table,
        *,
        table: Table,
        started: float,
        rejects: Sequence[Mapping[str, Any]] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> PartRecord:
        """Commit one part's rows with the digests of its parents; `table` is the stage's, `started`
        from `time.monotonic`."""
        self.check_lease(part)
        texts: list[dict[str, str | None]] = [
            {"stage": self.stage, **{name: str(value) for name, value in reject.items() if value is not None}}
            for reject in rejects
        ]
        return self.store.commit_part(
            part.key,
            rows,
            table=table,
            rejects=rejects_table(texts),
            parents=self.parent_digests(part),
            metadata={**part.slice, **(metadata or {})},
            replace=part.replace,
            seconds=time.monotonic() - started,
        )

    def commit_folder(
        self, part: PartPlan, folder: Path, *, rows: int, started: float, metadata: Mapping[str, Any]
    ) -> PartRecord:
        """Commit a model folder, then remove the part's work folder."""
        self.check_lease(part)
        record = self.store.commit_folder(
            part.key,
            folder,
            rows=rows,
            parents=self.parent_digests(part),
            metadata=metadata,
            replace=part.replace,
            seconds=time.monotonic() - started,
        )
        self.store.clear_work(part.key)
        clear_checkpoints(self.store, part.key)
        return record

    def parent_digests(self, part: PartPlan) -> dict[str, str]:
        """The digest of every parent part, by fingerprint."""
        return {record.fingerprint: record.digest for record in self.records(part.inputs)}


def progress_of(run: Callable[[Callable[[Mapping[str, Any]], None]], object]) -> Iterator[Progress]:
    """What a training run reports, as it comes; `run` gets the function to report with and is
    called in a thread.

    A report has `step`, `total_steps` and metrics. What the run raises is raised here. Called in
    the main thread, a SIGTERM is noted for the run, which saves a checkpoint and stops.
    """
    reports: queue.Queue[Progress | BaseException | None] = queue.Queue()

    def target() -> None:
        try:
            run(lambda report: reports.put(_progress(report)))
            reports.put(None)
        except BaseException as error:
            reports.put(error)

    with noting_sigterm():
        threading.Thread(target=target, name="training", daemon=True).start()
        while (report := reports.get()) is not None:
            if isinstance(report, BaseException):
                raise report
            yield report


def _progress(report: Mapping[str, Any]) -> Progress:
    loss = f"loss {report['loss']:.4g}" if "loss" in report else ""
    return Progress(report["step"], report["total_steps"], loss)
