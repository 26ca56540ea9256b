"""One stage of the pipeline inside a Prefect flow of your own.

    python -m examples.prefect_flow demo/config.yaml artifacts

The flow refreshes the quantiles every time it runs, and warns about prompts whose reference rewards
are all equal: they teach the policy nothing. Stages that the store already has return at once.
"""

import sys

import polars as pl
from prefect import flow, get_run_logger, task

import storage
from flows import pipeline
from tasks.config import load_config


@task
def share_of_flat_prompts(store: str, run: str) -> float:
    """Share of the prompts whose reference rewards are all equal."""
    rewards = pl.col("ref_rewards")
    flat = (rewards.list.min() == rewards.list.max()).mean()
    table = storage.open(store, run, "quantiles").lazy
    return float(table.select(flat).collect().item())


@flow(name="refresh-quantiles")
def refresh_quantiles(config_path: str, store: str, limit: float = 0.2) -> float:
    """Compute everything up to the quantiles; return the share of flat prompts."""
    config = load_config(config_path)
    pipeline(config, store, last="quantiles")
    share = share_of_flat_prompts(store, config.name)
    if share > limit:
        get_run_logger().warning("%.0f%% of the prompts are flat: use a finer reward", 100 * share)
    return share


if __name__ == "__main__":
    print(refresh_quantiles(*sys.argv[1:]))
