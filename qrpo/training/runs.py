"""Training runs of the pipeline: their restart after a kill, their progress, their result.

A run owns a folder:

    checkpoint-<step>/    to resume from after a kill; the newest complete one is used, broken ones
                          are removed
    unfinished/           the checkpoint or model that is being written
    checkpoints/<step>/   models of intermediate steps, kept for evaluation
    metrics.parquet       one row per logged step
    final/                the trained model and its tokenizer; renamed to this last, so it is always
                          complete
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from qrpo.data.chat import end_of_turn, load_tokenizer
from qrpo.errors import ConfigError, DataError, TrainingError
from qrpo.models import ModelConfig, load_causal_lm
from qrpo.processes.preemption import noting_sigterm, sigterm_came
from qrpo.training.adapters import with_lora
from qrpo.training.checkpoints import UNFINISHED, latest_checkpoint, remove_broken_checkpoints
from qrpo.training.logprobs import unwrapped
from qrpo.training.memory import device_bytes, planned_memory
from qrpo.training.objectives import sft_objective
from qrpo.training.saved_model import ModelSaver
from qrpo.training.settings import OptimizationConfig, PolicyConfig, SftConfig
from qrpo.training.trainer import CompletionTrainer, QRPOTrainer
from qrpo.training.trainer_arguments import training_arguments

OnProgress = Callable[[dict[str, Any]], None]
Saving = Callable[[], AbstractContextManager[None]]


def train_policy(
    model: ModelConfig | str | Path,
    dataset: Any,
    config: PolicyConfig | SftConfig,
    output_dir: str | Path,
    *,
    seed: int = 0,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
    resume: bool = True,
    on_progress: OnProgress | None = None,
    saving: Saving = nullcontext,
) -> Path:
    """Train `model` to the end; returns the folder `output_dir/final`.

    With a PolicyConfig, `model` is the reference and `dataset` what `QRPOTrainer` takes: rows of
    shards, or a reader with `iterate(epoch, start)` and a length. With an SftConfig the model is
    fine-tuned on all completions of the rows. `seed` is used if the section has none. `eval_rows`
    are held out for `eval_loss`. `on_progress` is called after each logged step with `step`,
    `total_steps`, `epoch`, `loss` and the other metrics.

    If the run is killed, the same call resumes from its newest complete checkpoint (`resume`) and
    ends with the same weights. Each checkpoint is written within the context manager that `saving`
    returns. A SIGTERM saves a checkpoint after the current step, then raises TrainingError, as do a
    checkpoint that cannot be written, a reference that does not match, and a loss that is not
    finite. In a process that `torchrun` or `accelerate launch` started this is one rank's part, and
    all ranks must call it.
    """
    if hasattr(dataset, "__len__") and not len(dataset):
        raise DataError("there are no rows to train on: look at the rejects of the earlier stages")
    model, output_dir = _model_config(model), Path(output_dir)
    arguments = training_arguments(config, output_dir, seed)
    policy, tokenizer = _model_to_train(model, config, arguments), load_tokenizer(model, chat_template=False)
    if isinstance(config, PolicyConfig):
        arguments.eval_strategy = "steps" if eval_rows else arguments.eval_strategy
        trainer: Any = QRPOTrainer(policy, arguments, dataset, tokenizer, eval_dataset=eval_rows)
        every = config.checkpoint_steps
    else:
        trainer = CompletionTrainer(policy, arguments, dataset, sft_objective(), processing_class=tokenizer)
        every = None
    trainer.around_save = saving
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    saver = ModelSaver(trainer, model, output_dir, config.save_dtype, every)
    settle_generation_config(policy, tokenizer)
    trainer.add_callback(_ReportAndStop(trainer, on_progress))
    trainer.add_callback(saver)
    if trainer.args.should_save:
        remove_broken_checkpoints(output_dir)
        if not resume:
            for path in (*output_dir.glob("checkpoint-*"), *output_dir.glob("checkpoints")):
                shutil.rmtree(path)
    trainer.accelerator.wait_for_everyone()
    checkpoint = latest_checkpoint(output_dir)
    with noting_sigterm():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if _stopped(trainer) and step < steps:
        raise TrainingError(
            f"stopped by SIGTERM after step {step} of {steps}; its checkpoint is saved, and the same command resumes from it"
        )
    saver.save("final")
    if trainer.args.should_save:
        shutil.rmtree(output_dir / UNFINISHED)
    trainer.accelerator.wait_for_everyone()
    return output_dir / "final"


def load_policy(model: ModelConfig | str | Path, device: str | None = None) -> Any:
    """The model to train, or to score with as training does: float32 weights, in evaluation mode.

    Mixed precision needs float32 weights; a reference scored with them in the same autocast agrees
    with the policy at step 0. `device` defaults to the first GPU, or the CPU if there is none.
    """
    return load_causal_lm(_float32(model), device)


def _model_to_train(model: ModelConfig, config: OptimizationConfig, arguments: Any) -> Any:
    """The model on this rank's device. If it will be sharded, on the CPU, and on the ranks after
    the first without weights: the trainer distributes those of the first."""
    device = str(arguments.device)  # the first use selects this rank's device
    if available := device_bytes(arguments.device):
        planned_memory(model, config, arguments.world_size, available)
    if not arguments.fsdp:
        policy = load_causal_lm(model.model_copy(update={"dtype": config.weights}), device)
    elif arguments.process_index == 0:
        policy = load_policy(model, "cpu")
    else:
        policy = load_causal_lm(_float32(model), empty=True)
    section = "policy" if isinstance(config, PolicyConfig) else "reference.sft"
    return policy if config.lora is None else with_lora(policy, config.lora, arguments.seed, section)


def settle_generation_config(model: Any, tokenizer: Any) -> None:
    """Make the model's generation config one that can be saved and that ends at the turn's end.

    Sampling settings without `do_sample`, as Llama 2 has them, are taken to ask for sampling.
    Raises ConfigError for what else transformers would refuse to save, before the training.
    """
    config = unwrapped(model).generation_config
    ends = config.eos_token_id
    ends = [end for end in (ends if isinstance(ends, (list, tuple)) else [ends]) if end is not None]
    end = end_of_turn(tokenizer) if tokenizer is not None else None
    if end is not None and end not in ends:
        config.eos_token_id = [*ends, end] if ends else end
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            f"generation_config.json of the model could not be saved after the training: {str(error).strip()}. Fix it first"
        ) from None


def _model_config(model: ModelConfig | str | Path) -> ModelConfig:
    return model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))


def _float32(model: ModelConfig | str | Path) -> ModelConfig:
    return _model_config(model).model_copy(update={"dtype": "float32"})


def _stopped(trainer: CompletionTrainer) -> bool:
    """Whether any process received a SIGTERM: all must stop after the same step."""
    came = torch.tensor(float(sigterm_came()), device=trainer.args.device)
    return bool(trainer.accelerator.reduce(came, "sum") > 0)


class _ReportAndStop(TrainerCallback):  # type: ignore[misc]
    """Reports progress, stops after a SIGTERM, and logs with every checkpoint, so that a resumed
    run logs the same steps as an uninterrupted one."""

    def __init__(self, trainer: CompletionTrainer, on_progress: OnProgress | None) -> None:
        self.trainer = trainer
        self.on_progress = on_progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if best.is_dir():  # the Trainer notes its path, and the folder may have moved since
            state.best_model_checkpoint = str(best)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if _stopped(self.trainer):
            control.should_save = control.should_training_stop = True
        last = state.global_step >= state.max_steps
        if control.should_save or control.should_evaluate or last:  # a best evaluation saves a checkpoint
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if self.on_progress is not None and state.is_world_process_zero and "loss" in logs:
            self.on_progress({"step": state.global_step, "total_steps": state.max_steps, **logs})
