# %% [markdown]
"""# Looking at a run

Open this file as a notebook (VS Code, PyCharm, Jupyter with jupytext) or run it as a script:

    python examples/notebook.py STORE RUN

`storage.open(STORE, RUN, STAGE)` is one artifact. `.lazy` is a Polars LazyFrame, `.dataset` an
Arrow dataset. Both read only the requested columns, from any store (a folder, `s3://`, `gs://`).
"""

# %%
import sys

import polars as pl

import storage

STORE, RUN = sys.argv[1:3] if len(sys.argv) == 3 else ("artifacts", "demo")

# %% [markdown]
# ## Which completions are best, and how long are they?

# %%
completions = storage.open(STORE, RUN, "completions").lazy
rewards = storage.open(STORE, RUN, "rewards").lazy
key = ["prompt_id", "origin", "sample_index"]

best = (
    completions.join(rewards, on=key)
    .select("prompt_id", "reward", "text", length=pl.col("token_ids").list.len())
    .sort("reward", descending=True, nulls_last=True)
    .head(10)
    .collect()
)
print(best)

# %% [markdown]
# ## How much do rewards vary within and between prompts?
#
# A prompt whose rewards are all equal teaches nothing: each of its quantiles is 1.

# %%
spread = (
    rewards.filter(pl.col("reward").is_not_null())
    .group_by("prompt_id")
    .agg(mean=pl.col("reward").mean(), within=pl.col("reward").std(), equal=pl.col("reward").n_unique() == 1)
    .select(
        prompts=pl.len(),
        between=pl.col("mean").std(),
        within=pl.col("within").mean(),
        all_equal=pl.col("equal").mean(),
    )
    .collect()
)
print(spread)

# %% [markdown]
# ## Are the quantiles of the reference's own samples uniform, as the method assumes?
#
# One row of `quantiles` is a prompt; its lists hold one element per completion.

# %%
quantiles = (
    storage.open(STORE, RUN, "quantiles")
    .lazy.select("origin", "quantile_reward")
    .explode("origin", "quantile_reward")
)
print(quantiles.group_by("origin").agg(pl.len(), pl.col("quantile_reward").mean()).collect())

# %% [markdown]
# ## An Arrow dataset for DuckDB, pandas or PyTorch; rejected rows

# %%
dataset = storage.open(STORE, RUN, "rewards").dataset
print(
    dataset.count_rows(),
    "rows;",
    dataset.to_table(columns=["reward"]).column("reward").null_count,
    "without a reward",
)

for stage in ("prompts", "completions", "rewards"):
    print(stage, "rejected:", storage.open(STORE, RUN, stage).rejects.num_rows)
