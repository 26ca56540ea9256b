"""The `policy` stage: train from the shards, streaming, from the last whole checkpoint where there is one."""

import math
import shutil
import time
from collections.abc import Iterator, Mapping
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
    rows = sum(record.rows for record in work.inputs(part, "shards"))
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
    from qrpo.training.loader import held_out
    from qrpo.training.runs import train_policy

    (part,) = work.parts
    section = work.config.policy

    reader: Any = ShardReader(
        work.store, work.inputs(part, "shards"), seed=_seed(work.config), columns=section.columns()
    )
    eval_rows = None
    if section.eval_fraction:
        rows = list(reader.iterate(0))
        held = [held_out(row["prompt_id"], section.eval_fraction, _seed(work.config)) for row in rows]
        eval_rows = [row for row, out in zip(rows, held, strict=True) if out]
        reader = [row for row, out in zip(rows, held, strict=True) if not out]
        if not eval_rows or not reader:
            raise ConfigError(
                f"policy.eval_fraction is {section.eval_fraction}, and of {len(rows)} prompts {len(eval_rows)} are held out: "
                "both sides need at least one"
            )
    settings = section
    if work.config.rounds.from_run is None:
        model = model_for(work, part)
    else:  # a later round starts where the one before ended, away from the reference
        model = model_for(work, part, stage="policy")
        settings = settings.model_copy(update={"max_initial_log_ratio": math.inf})
    scaled = section.uses_quantiles and get_transform(section.transform).needs_scale
    if scaled and section.mean_ref_std is None:
        settings = settings.model_copy(update={"mean_ref_std": _mean_ref_std(work, part)})
    folder = work.store.work_dir(part.key)
    seed = _seed(work.config)
    yield from progress_of(
        lambda report: train_policy(
            model, reader, settings, folder, seed=seed, eval_rows=eval_rows, on_progress=report
        )
    )


def _seed(config: "PipelineConfig") -> int:
    return config.seed if config.policy.seed is None else config.policy.seed


def _mean_ref_std(work: Work, part: PartPlan) -> float:
    """The mean spread of reference rewards over all prompts, by which scaled transforms divide each prompt's own."""
    import polars as pl

    shards = work.store.scan(work.inputs(part, "shards"))
    return float(shards.select(pl.col("ref_std").mean()).collect().item())
