"""The `policy` stage: train from the shards, streaming, from the last whole checkpoint where there is one."""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qrpo.config import keyed
from qrpo.errors import ConfigError, DataError
from qrpo.method.transforms import get_transform
from qrpo.training.ranks import stream_ranks
from storage import PartKey, PartRecord, ShardReader, Store, fingerprint
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.rounds import previous_policy
from tasks.stages.reference import model_for, reference_identity, reference_inputs, reference_parent
from tasks.work import Progress, Work, progress_of

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["compute", "plan", "train"]

VERSION = 3


def plan(config: "PipelineConfig", plans: Mapping[str, StagePlan], store: Store) -> StagePlan:
    """One part, the policy's folder, from all shards."""
    settings: dict[str, Any] = {**keyed(config.policy), "seed": _seed(config)}
    outside = {"model": reference_identity(config, plans)}
    before = previous_policy(config, store)
    if before is not None:
        outside["start"] = {"artifact": before.fingerprint}
    family = make_family("policy", VERSION, settings, outside)
    shards = [part.key for part in plans["shards"].parts]
    parts: tuple[PartPlan, ...] = ()
    if shards:
        key = PartKey("policy", family, fingerprint([family, [shard.fingerprint for shard in shards]]))
        parts = (PartPlan(key, (*shards, *reference_inputs(plans), *((before.key,) if before else ()))),)
    parents = {"shards": plans["shards"].fingerprint, **reference_parent(plans)}
    return StagePlan("policy", family, settings, outside, parts, parents)


def compute(work: Work) -> Iterator[PartRecord | Progress]:
    """Train and commit the policy's folder. Runs in a child process; checkpoints lie in the store's work folder."""
    (part,) = work.parts
    started = time.monotonic()
    training, _ = _cut(work, part)
    rows = sum(record.rows for record in training)
    if not rows:
        raise DataError(
            "policy: the shards hold no rows; `qrpo inspect CONFIG shards` and its rejects say why"
        )
    processes = work.config.policy.processes
    if processes == 1:
        yield from train(work)
    elif work.store.url.startswith("memory://"):
        raise ConfigError(
            f"policy.processes is {processes}, and a memory:// store is seen by one process only"
        )
    else:
        yield from stream_ranks("tasks.stages.policy:train", work, processes=processes, log=work.log)
    scratch = work.store.work_dir(part.key)
    shutil.copy(scratch / "metrics.parquet", scratch / "final" / "metrics.parquet")
    if (scratch / "checkpoints").is_dir():
        shutil.copytree(scratch / "checkpoints", scratch / "final" / "checkpoints", dirs_exist_ok=True)
    yield work.store.commit_folder(
        part.key,
        scratch / "final",
        rows=rows,
        parents=work.parent_digests(part),
        seconds=time.monotonic() - started,
        replace=part.replace,
    )
    work.store.clear_work(part.key)


def train(work: Work) -> Iterator[Progress]:
    """Train into the work folder: the whole run, or one rank's part of it where `qrpo.training.ranks` started this process."""
    from qrpo.training.runs import train_policy

    (part,) = work.parts
    section = work.config.policy

    def read(records: Sequence[PartRecord]) -> ShardReader:
        return ShardReader(work.store, records, seed=_seed(work.config), columns=section.columns())

    training, held_out = _cut(work, part)
    reader, eval_rows = read(training), list(read(held_out).iterate(0)) if held_out else None
    settings = section.with_seed(_seed(work.config))
    if work.config.rounds.from_run is None:
        model = model_for(work, part)
    else:  # a later round starts where the one before ended, away from the reference
        model = model_for(work, part, stage="policy")
        settings = settings.model_copy(update={"max_initial_log_ratio": math.inf})
    scaled = "transform" not in section.idle_fields() and get_transform(section.transform).needs_scale
    spread = _mean_ref_std(work, part) if scaled else None
    folder = work.store.work_dir(part.key)
    yield from progress_of(
        lambda report: train_policy(
            model, reader, settings, folder, eval_rows=eval_rows, mean_ref_std=spread, on_progress=report
        )
    )


def _cut(work: Work, part: PartPlan) -> tuple[Sequence[PartRecord], Sequence[PartRecord]]:
    """The shards to train on, and the last ones, which are held out."""
    shards, held_out = work.inputs(part, "shards"), work.config.policy.eval_shards
    if held_out and len(shards) <= held_out:
        raise ConfigError(
            f"policy.eval_shards is {held_out} and there are {len(shards)} shards, none to train on: lower it, or make "
            "parts smaller (run.part_size)"
        )
    return shards[: len(shards) - held_out], shards[len(shards) - held_out :]


def _seed(config: "PipelineConfig") -> int:
    return config.seed if config.policy.seed is None else config.policy.seed


def _mean_ref_std(work: Work, part: PartPlan) -> float:
    """The mean spread of reference rewards over all prompts, by which scaled transforms divide each prompt's own."""
    import polars as pl

    shards = work.store.scan(work.inputs(part, "shards"))
    return float(shards.select(pl.col("ref_std").mean()).collect().item())
