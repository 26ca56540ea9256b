"""Training on whole completions.

- `arguments`: the training settings, each declared once
- `settings`: the YAML sections `policy` and `reference.sft`
- `trainer_arguments`: `QRPOConfig`, and the trainer's arguments for a YAML section
- `trainer`: `QRPOTrainer`
- `objectives`: each loss: the completions it uses, its terms, its metrics
- `rows`: training rows, and datasets in TRL's formats as such rows
- `loader`: which rows each process trains on at each step
- `batches`: forward passes within a token budget
- `packing`: rows of many conversations without padding, and their attention
- `compiling`: compiled decoder layers
- `memory`: the memory that training needs, and what follows for checkpointing
- `logprobs`: log-probabilities of completions, for training and scoring
- `head`: the output layer and softmax in chunks
- `callbacks`: stopping or skipping bad steps, early stopping
- `checks`: models that cannot be trained; the policy equals its reference before the first step
- `adapters`: LoRA
- `master_weights`: bfloat16 weights with float32 copies in the optimizer
- `sharding`: FSDP2, and checkpoints that fit any number of processes
- `saved_model`: saved models in a precision that keeps what training changed
- `checkpoints`: complete checkpoints, written atomically
- `throughput`: tokens per second, MFU, remaining time
- `runs`: training runs of the pipeline, with resume and progress
- `ranks`: training on several processes of this machine
"""
