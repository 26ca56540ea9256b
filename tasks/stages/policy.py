"""The `policy` stage: train from the shards, streaming, from the last whole checkpoint where there
is one."""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrpo.callables import source_digests
from qrpo.config import keyed
from qrpo.errors import ConfigError, DataError
from qrpo.method.transforms import get_transform
from qrpo.models import ModelConfig
from qrpo.training.loader import held_out
from qrpo.training.ranks import number_of_processes
from qrpo.training.settings import PolicyConfig
from storage import PartRecord, ShardReader, Store
from tasks.plan import PartPlan, StagePlan, Upstream, add_digests, make_family, part_key, single_part
from tasks.stage import Stage, setting
from tasks.stages.reference import model_for, on_ranks, precision_settings
from tasks.stages.shards import TABLE as SHARDS
from tasks.training_files import training_files
from tasks.work import Progress, Work, progress_of

VERSION = 4


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    section: PolicyConfig = setting("policy")
    model: ModelConfig = setting("reference.model")
    run_seed: int = setting("seed")
    from_run: str | None = setting("rounds.from_run")

    @property
    def seed(self) -> int:
        """`policy.seed`, or the run's."""
        return self.run_seed if self.section.seed is None else self.section.seed


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """One part, the policy's folder, from all shards."""
    section = settings.section
    hashed = {**keyed(section), **precision_settings(section, settings.model), "seed": settings.seed}
    outside = {"model": upstream.reference_identity}
    if settings.section.uses_quantiles and ":" in settings.section.transform:
        outside["transform"] = dict(source_digests(settings.section.transform))
    before = upstream.previous_policy
    if before is not None:
        outside["start"] = {"artifact": before.fingerprint}
    family = make_family("policy", VERSION, hashed, outside)
    shards = upstream["shards"]
    parents = upstream.parents("shards", "reference")
    if not shards.parts:
        return StagePlan("policy", family, hashed, outside, (), parents)
    earlier = part_key(
        "policy",
        make_family("policy", 3, hashed, outside),
        [part.key.fingerprint for part in shards.parts],
    )
    key, artifact = single_part("policy", family, upstream.store, shards.rows["train"], earlier=earlier)
    inputs = (
        *(part.key for part in shards.parts),
        *upstream.reference_inputs,
        *((before.key,) if before else ()),
    )
    reads = (
        _row_sum([shards.records[part.key.fingerprint] for part in shards.parts]) if shards.complete else None
    )
    part = PartPlan(key, inputs, {"reads": reads} if reads else {})
    return StagePlan("policy", family, hashed, outside, (part,), parents, artifact=artifact, reads=reads)


def _row_sum(shards: Sequence[PartRecord]) -> str | None:
    """The digest of all shards' rows in any cut; None where an earlier version wrote one."""
    sums = [record.metadata["row_sum"] for record in shards if "row_sum" in record.metadata]
    return add_digests(sums) if len(sums) == len(shards) else None


def compute(work: Work[Settings]) -> Iterator[PartRecord | Progress]:
    """Train and commit the policy's folder. Runs in a child process; checkpoints are in the store's
    work folder."""
    (part,) = work.parts
    started = time.monotonic()
    work.resume(part)
    _, training, _ = _files(work, part)
    rows = sum(record.rows for record in training)
    if not rows:
        raise DataError(
            "policy: no row is left to train on; `qrpo inspect RUN shards` and its rejects say why, and "
            "policy.eval_fraction how many are held out"
        )
    yield from on_ranks(train, work, work.settings.section)
    scratch = work.folder(part)
    shutil.copy(scratch / "metrics.parquet", scratch / "final" / "metrics.parquet")
    if (scratch / "checkpoints").is_dir():
        shutil.copytree(scratch / "checkpoints", scratch / "final" / "checkpoints", dirs_exist_ok=True)
    reads = _row_sum(work.inputs(part, "shards"))
    metadata = {"reads": reads} if reads else {}
    yield work.commit_folder(part, scratch / "final", rows=rows, started=started, metadata=metadata)


def train(work: Work[Settings]) -> Iterator[Progress]:
    """Train into the work folder: the whole run, or one rank's part of it where
    `qrpo.training.ranks` started this process."""
    from qrpo.training.runs import train_policy

    (part,) = work.parts
    section, seed = work.settings.section, work.settings.seed
    files, training, held = _files(work, part)

    def read(records: Sequence[PartRecord]) -> ShardReader:
        return ShardReader(files, records, seed=seed, columns=section.columns())

    fraction = section.eval_fraction
    if fraction and not held:
        raise ConfigError(
            f"policy.eval_fraction is {fraction} and holds out none of {sum(file.rows for file in training)} prompts: raise it"
        )
    reader, eval_rows = read(training), list(read(held).iterate(0)) if held else None
    arguments = section
    if work.settings.from_run is None:
        model = model_for(work, part, work.settings.model)
    else:  # a later round starts where the one before ended, away from the reference
        model = model_for(work, part, work.settings.model, stage="policy")
        arguments = arguments.model_copy(update={"max_initial_log_ratio": math.inf})
    scaled = section.uses_quantiles and get_transform(section.transform).needs_scale
    if scaled and section.mean_ref_std is None:
        shards = work.store.scan(work.inputs(part, "shards"))
        stds = shards.select("ref_std").drop_nulls().collect()["ref_std"]
        mean = math.fsum(stds) / len(stds)  # exact, so the same in any order
        arguments = arguments.model_copy(update={"mean_ref_std": mean})
    folder = work.folder(part)
    options: dict[str, Any] = {
        "seed": seed,
        "eval_rows": eval_rows,
        "saving": lambda: work.saving(part),
    }
    yield from progress_of(
        lambda report: train_policy(model, reader, arguments, folder, on_progress=report, **options)
    )


def _files(work: Work[Settings], part: PartPlan) -> tuple[Store, list[PartRecord], list[PartRecord]]:
    """The training files in the work folder, and those held out."""
    settings = work.settings
    return training_files(
        work.store,
        work.inputs(part, "shards"),
        SHARDS,
        work.folder(part) / "training-files",
        settings.seed,
        lambda prompt_id: held_out(prompt_id, settings.section.eval_fraction, settings.seed),
    )


def checkpoint_model(policy: ModelConfig, step: int) -> ModelConfig:
    """The model of a step of the training that made the policy; ConfigError where its folder does
    not keep that one."""
    folder = Path(policy.path) / "checkpoints"
    if not (folder / str(step)).is_dir():
        kept = ", ".join(sorted((path.name for path in folder.glob("*")), key=int)) or "none"
        raise ConfigError(
            f"evaluation.checkpoints: the policy keeps no checkpoint of step {step}; its checkpoints: {kept}. "
            "policy.checkpoint_steps says which are kept; changing it trains again"
        )
    return policy.model_copy(update={"path": str(folder / str(step))})


STAGE = Stage(
    name="policy",
    version=VERSION,
    summary="Fit the policy by regression: (f(q) - beta log Z - beta log(policy / reference))^2.",
    unit="prompts",
    parents=("shards",),
    settings=Settings,
    section=PolicyConfig,
    plan=plan,
    compute=compute,
    in_child=True,
    trains=True,
    gpus=lambda settings: number_of_processes(settings.section),
    chart="tasks.charts:training_loss",
)
