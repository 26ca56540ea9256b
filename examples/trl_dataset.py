"""`QRPOTrainer` on a dataset in TRL's format, without the pipeline: LoRA, evaluation, resuming, a
tracker.

    python -m examples.trl_dataset --model MODEL --data DATA.jsonl --output policy

A row of the dataset has `prompt`, `completion`, its `reward`, and `ref_rewards`: rewards of
completions that MODEL gave for the same prompt. A row with `chosen`, `rejected`, `chosen_reward`
and `rejected_reward` works as well. Run the command again after an interruption: it resumes.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from qrpo import QRPOConfig, QRPOTrainer


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the reference policy: a folder or a hub id")
    parser.add_argument("--data", required=True, help="a JSONL file")
    parser.add_argument("--output", default="policy", help="folder of checkpoints and of the trained adapter")
    parser.add_argument("--beta", type=float, default=0.1, help="strength of the KL penalty")
    parser.add_argument("--report-to", default="none", help="a tracker: tensorboard, wandb, trackio, mlflow")
    options = parser.parse_args()

    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    # The reference is the model with its adapters off, so no second copy is loaded.
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    config = QRPOConfig(
        output_dir=options.output,
        beta=options.beta,
        learning_rate=1e-4,
        per_device_train_batch_size=8,  # prompts; memory is bounded by `token_budget`
        num_train_epochs=1,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=50,
        logging_steps=1,
        report_to=options.report_to,
    )
    trainer = QRPOTrainer(
        model, config, train_dataset=rows["train"], eval_dataset=rows["test"], processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output))
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
