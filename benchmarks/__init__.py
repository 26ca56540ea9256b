"""Measurements of the pipeline and its peers. README.md has the figures and the command for each.

harness.py            clocks, interleaved rounds, summaries, machine facts, command line, JSON
store_data.py         synthetic parts of the prompts, completions and rewards stages; a stage
                      computed over parts
quantiles.py          quantile rewards in memory and from Parquet; the quantiles and shards stages
                      up to 1e7 completions
rewards.py            scoring with a reward model
training_step.py      one training step beside TRL's DPOTrainer, on a CPU or one GPU
gradients.py          packing and prompt sharing: ways to compute the same gradient
optimum.py            does QRPO find the optimum? a task small enough to enumerate
streaming_readers.py  the training data reader beside six others
sandbox.py            solutions judged per second
inspection.py         `qrpo inspect` over ten million rows beside DuckDB and Polars
orchestration.py      seconds and memory that each part costs a run
"""
