"""FSDP2: weights, gradients and optimizer state sharded over the processes.

Layers are gathered in float32 and compute under autocast, as on one process, so `fsdp` changes no
result. Gathered in bfloat16, which takes half the communication, norms and embeddings would be
rounded, and what the model returns too: bfloat16 cannot represent the log-probability of a whole
completion.

A checkpoint has the whole weights as an ordinary model folder, and the optimizer's state in the
format of `torch.distributed.checkpoint`, to which each process writes its share. So a run resumes
with any number of processes, sharded or not.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import Trainer

from qrpo.errors import ConfigError, TrainingError
from qrpo.training.master_weights import keep_masters, masters_loaded

OPTIMIZER, SCHEDULER, EARLIER_OPTIMIZER = "optimizer", "scheduler.pt", "optimizer.pt"


class ShardingTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` with these numbers and checkpoints if `args.fsdp` is set."""

    def create_accelerator_and_postprocess(self) -> None:
        """Also keep float32 weights, and shard on CPUs, where torch can but accelerate does not ask
        it to."""
        args = self.args
        if args.weights == "bfloat16" and args.world_size > 1:
            raise ConfigError("weights: bfloat16 trains in one process, and there are several: use float32")
        if args.fsdp:
            if args.world_size == 1:
                raise ConfigError(
                    "fsdp shards a model over several processes, and there is one: leave fsdp out"
                )
            # Accelerate fails for layers that the model's class knows and this model does not have.
            layers = set(getattr(self.model, "_no_split_modules", None) or ())
            args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = sorted(
                layers & {type(module).__name__ for module in self.model.modules()}
            )
            args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
            if args.use_cpu:
                PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Also give each rank its share of the weights that rank 0 loaded (see
        `load_policy`)."""
        whole = self.model.state_dict() if self.is_fsdp_enabled else {}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled and resume_from_checkpoint is None:
            _set_weights(self.model, whole)
        return prepared

    def create_optimizer(self, *arguments: Any) -> Any:
        """Also keep float32 copies of bfloat16 weights."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*arguments)
        if created and self.args.weights == "bfloat16":
            keep_masters(optimizer)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as `save_pretrained` does. All ranks must call it."""
        if self.is_fsdp_enabled:
            weights = whole_weights(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with _quiet_alone() as alone:
            folder = Path(output_dir, OPTIMIZER)
            checkpoint.save(self._optimizer_state(), checkpoint_id=folder, no_dist=alone)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None or Path(folder, EARLIER_OPTIMIZER).is_file():
            super()._load_optimizer_and_scheduler(folder)
            return
        try:
            with masters_loaded(self._inner_optimizer()), _quiet_alone() as alone:
                state = self._optimizer_state()
                checkpoint.load(state, checkpoint_id=Path(folder, OPTIMIZER), no_dist=alone)
                set_optimizer_state_dict(self.model, self._inner_optimizer(), state)
        except (CheckpointException, KeyError, ValueError) as error:
            raise TrainingError(
                f"{folder} is a checkpoint of another model or another optimizer: resume with the settings that it was written "
                f"with, or delete it ({str(error).splitlines()[0]})"
            ) from error
        self.lr_scheduler.load_state_dict(torch.load(Path(folder, SCHEDULER)))

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state by weight names, each rank's share of it where it is sharded."""
        return get_optimizer_state_dict(self.model, self._inner_optimizer())  # type: ignore[no-any-return]

    def _inner_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        earlier = (EARLIER_OPTIMIZER if self.is_fsdp_enabled else "", "optimizer.bin")
        if any((folder / name).is_file() for name in earlier):
            raise TrainingError(
                f"{folder}: an earlier version wrote this checkpoint, from a sharded model. Finish the run with that version, or "
                "delete the folder to start again"
            )
        if self.is_fsdp_enabled:
            _load_weights(self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            _load_weights(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


@contextmanager
def _quiet_alone() -> Iterator[bool]:
    """Whether this is the only process, of which torch would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield not torch.distributed.is_initialized()


def reshard(model: torch.nn.Module) -> None:
    """Free the whole weights that a forward without a backward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name on the CPU, without the copies of tied ones. All ranks must call it; the
    ranks after the first get nothing."""
    reshard(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    return {name: weight for name, weight in weights.items() if name not in tied}


def _load_weights(model: torch.nn.Module, folder: Path) -> None:
    files = sorted(folder.glob("model*.safetensors")) if torch.distributed.get_rank() == 0 else []
    try:
        _set_weights(model, {name: weight for file in files for name, weight in load_file(file).items()})
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"{folder} is a checkpoint of another model: delete it ({str(error).splitlines()[0]})"
        ) from error


def _set_weights(model: torch.nn.Module, whole: dict[str, torch.Tensor]) -> None:
    """Give each rank its share of the whole weights that the first rank has."""
    reshard(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, whole if torch.distributed.get_rank() == 0 else {}, options=options)
