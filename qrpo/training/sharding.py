"""FSDP2: weights, gradients and optimizer state sharded over the processes.

Layers are gathered in float32 and compute under autocast, as on one process, so `fsdp` changes no
result. Gathered in bfloat16, which takes half the communication, norms and embeddings would be
rounded, and what the model returns too: bfloat16 cannot represent the log-probability of a whole
completion.

Checkpoints hold whole tensors in the files of an unsharded run. So a run resumes with any number of
processes, sharded or not.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from qrpo.errors import ConfigError, TrainingError

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # the Trainer's own names


class ShardingTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` with these numbers and checkpoints if `args.fsdp` is set."""

    def create_accelerator_and_postprocess(self) -> None:
        """Also keep float32 weights, and shard on CPUs, where torch can but accelerate does not ask
        it to."""
        args = self.args
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
            for name, weight in self.model.state_dict().items():
                if isinstance(weight, DTensor):
                    loaded = whole[name].to(weight.device)
                    weight.copy_(distribute_tensor(loaded, weight.device_mesh, weight.placements))
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as `save_pretrained` does. All ranks must call it."""
        if self.is_fsdp_enabled:
            weights = whole_weights(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            state = _whole_state(self.optimizer)
            if self.args.should_save:
                torch.save(state, Path(output_dir, OPTIMIZER))
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled and checkpoint is not None:
            _load_state(self.optimizer, torch.load(Path(checkpoint, OPTIMIZER), mmap=True))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER)))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / "optimizer.bin").is_file():
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


def reshard(model: torch.nn.Module) -> None:
    """Free the whole weights that a forward without a backward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name, without the copies of tied ones; gathered on the CPU of rank 0 if they are sharded.

    All ranks must call it; the other ranks of a sharded model get nothing.
    """
    reshard(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: whole
        for name, weight in model.state_dict().items()
        if name not in tied and (whole := _whole(weight)) is not None
    }


def _load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load each rank's share of the weights in a folder, one tensor at a time."""
    reshard(model)
    weights = model.state_dict()
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118
                weights[name].copy_(_share(saved.get_tensor(name), weights[name]))


def _whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's `state_dict` with whole tensors; as `whole_weights` does."""
    state: dict[str, Any] = optimizer.state_dict()
    of_params = {
        number: {name: _whole(value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": of_params}


def _load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load each rank's share of a `state_dict` with whole tensors."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    of_params = {
        number: {
            name: _share(value, params[number]) if torch.is_tensor(value) and value.dim() else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_params})


def _whole(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if torch.distributed.get_rank() == 0 else None


def _share(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """This rank's share of a tensor that all ranks have."""
    if not isinstance(like, DTensor):
        return whole
    if whole.shape != like.shape:
        raise TrainingError(
            f"a checkpoint holds a tensor of shape {tuple(whole.shape)} for a weight of shape {tuple(like.shape)}: it is of "
            "another model, or of an optimizer whose state cannot be sharded. Resume without fsdp, or delete the checkpoint"
        )
    share: torch.Tensor = distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return share
