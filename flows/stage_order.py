"""The stages' names in the order in which a run goes through them; `tasks.stages` says how each is made.

Apart from it so that a command that only looks at the store does not wait for what computes the stages.
"""

__all__ = ["STAGE_ORDER"]

STAGE_ORDER = (
    "prompts",
    "reference",
    "completions",
    "rewards",
    "quantiles",
    "shards",
    "policy",
    "evaluation",
)
