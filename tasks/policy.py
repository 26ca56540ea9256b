"""The `policy` stage: train from the shards, streaming, from the last whole checkpoint where there is one."""

import shutil
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qrpo.config import keyed
from qrpo.errors import DataError
from qrpo.transforms import get_transform
from storage import PartKey, PartRecord, ShardReader, Store, fingerprint
from tasks.plan import PartPlan, StagePlan, make_family
from tasks.reference import model_for, reference_identity, reference_inputs, reference_parent
from tasks.work import Progress, Work, progress_of

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["compute", "plan"]

VERSION = 1


def plan(config: "PipelineConfig", plans: Mapping[str, StagePlan], store: Store) -> StagePlan:
    """One part, the policy's folder, from all shards."""
    settings: dict[str, Any] = {**keyed(config.policy), "seed": config.seed}
    outside = {"model": reference_identity(config, plans)}
    family = make_family("policy", VERSION, settings, outside)
    shards = [part.key for part in plans["shards"].parts]
    parts: tuple[PartPlan, ...] = ()
    if shards:
        key = PartKey("policy", family, fingerprint([family, [shard.fingerprint for shard in shards]]))
        parts = (PartPlan(key, (*shards, *reference_inputs(plans))),)
    parents = {"shards": plans["shards"].fingerprint, **reference_parent(plans)}
    return StagePlan("policy", family, settings, outside, parts, parents)


def compute(work: Work) -> Iterator[PartRecord | Progress]:
    """Train and commit the policy's folder. Runs in a child process; checkpoints lie in the store's work folder."""
    from qrpo.policy import train_policy

    (part,) = work.parts
    started = time.monotonic()
    section = work.config.policy
    shards = work.inputs(part, "shards")
    reader = ShardReader(work.store, shards, seed=work.config.seed, columns=section.columns())
    if not len(reader):
        raise DataError(
            "policy: the shards hold no rows; `qrpo inspect CONFIG shards` and its rejects say why"
        )
    scratch = work.store.work_dir(part.key)
    model, settings = model_for(work, part), section.with_seed(work.config.seed)
    scaled = "transform" not in section.idle_fields() and get_transform(section.transform).needs_scale
    spread = _mean_ref_std(work, part) if scaled else None
    yield from progress_of(
        lambda report: train_policy(model, reader, settings, scratch, mean_ref_std=spread, on_progress=report)
    )
    shutil.copy(scratch / "metrics.parquet", scratch / "final" / "metrics.parquet")
    yield work.store.commit_folder(
        part.key,
        scratch / "final",
        rows=len(reader),
        parents=work.parent_digests(part),
        seconds=time.monotonic() - started,
        replace=part.replace,
    )
    work.store.clear_work(part.key)


def _mean_ref_std(work: Work, part: PartPlan) -> float:
    """The mean spread of reference rewards over all prompts, by which scaled transforms divide each prompt's own."""
    import polars as pl

    shards = work.store.scan(work.inputs(part, "shards"))
    return float(shards.select(pl.col("ref_std").mean()).collect().item())
