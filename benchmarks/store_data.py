"""Synthetic parts as the first stages leave them, and a stage computed over such parts."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage import PartKey, Store
from tasks.config import PipelineConfig, parse_config
from tasks.plan import PartPlan


def part_keys(stages: Iterable[str], name: str) -> dict[str, PartKey]:
    """Stage -> the key of its part of that name."""
    return {stage: PartKey(stage, "benchmark", name) for stage in stages}


def prompts_table(ids: Sequence[str], contents: Sequence[str]) -> pa.Table:
    """One user message for each prompt."""
    constant = {"split": "train", "source": "benchmark", "offline_completions": [], "metadata": "{}"}
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": prompt_id,
                "messages": [{"role": "user", "content": content}],
                **constant,
                "conversational": True,
            }
            for prompt_id, content in zip(ids, contents, strict=True)
        ]
    )


def row_keys(ids: Sequence[str], samples: np.ndarray) -> dict[str, Any]:
    """The key columns of the same samples of every prompt."""
    return {
        "prompt_id": np.repeat(ids, len(samples)),
        "sample_index": np.tile(samples.astype(np.int32), len(ids)),
        "origin": ["reference"] * (len(ids) * len(samples)),
    }


def completions_table(
    keys: dict[str, Any], texts: pa.Array, lengths: np.ndarray, rng: np.random.Generator
) -> pa.Table:
    """Completions of random tokens; a completion of more than 35 tokens ends by its length."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    tokens = pa.array(rng.integers(6, 256, size=int(lengths.sum()), dtype=np.int32))
    return pa.table(
        keys
        | {
            "text": texts,
            "token_ids": pa.ListArray.from_arrays(offsets, tokens),
            "finish_reason": np.where(lengths > 35, "length", "stop"),
            "sampled_logprob": rng.normal(-30, 5, size=len(lengths)).astype(np.float32),
        }
    )


def rewards_table(keys: dict[str, Any], rng: np.random.Generator) -> pa.Table:
    """Normal rewards."""
    rows = len(keys["prompt_id"])
    reward = rng.normal(size=rows).astype(np.float32)
    return pa.table(
        keys | {"reward": reward, "components": pa.nulls(rows), "error": pa.nulls(rows, pa.string())}
    )


def pipeline_config(model: str | Path, num_ref: int, **sections: Any) -> PipelineConfig:
    """A configuration of which only these settings matter."""
    return parse_config(
        {
            "prompts": {"source": "none"},
            "reference": {"model": {"path": str(model)}},
            "completions": {"num_ref": num_ref},
            "rewards": [{"kind": "function", "function": "none.py:none"}],
            **sections,
        }
    )


def compute(module: Any, store: Store, parts: Sequence[PartPlan], config: PipelineConfig) -> list[Any]:
    """What the stage in `module` commits for these parts, computed again where the store has them:
    read, compute, validate, commit."""
    for part in parts:
        store.discard_part(part.key)
    return list(module.compute(module.STAGE.work(config, store, parts)))
