"""What the report says: read from the store, cut down to what a page can show."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import yaml

from flows.evaluate import Cell, comparison_table
from flows.views.show import find_manifest, stages_of
from qrpo.evaluation.statistics import Floats
from storage import Manifest, Store
from tasks.config import PipelineConfig, parse_config

__all__ = ["Comparison", "Content", "gather"]

_ROWS = 8  # of each table of completions
_TEXT = 2_000  # characters of a prompt or completion
_PROMPTS = 2_000  # prompts whose reference rewards stand for all


@dataclass(frozen=True)
class Comparison:
    """One prompt with a completion of each model, side by side."""

    prompt: str
    reference: Mapping[str, Any]
    policy: Mapping[str, Any]
    change: float
    """The prompt's mean reward under the policy less that under the reference."""


@dataclass(frozen=True)
class Content:
    """Everything that the page is made from. What a run has not come to is None or empty."""

    name: str
    config: PipelineConfig
    config_text: str
    stages: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    sources: list[tuple[str, str]]
    summary: dict[str, Any] | None
    comparison: tuple[list[str], list[tuple[str, list[Cell]]]] | None
    """The summary as a table: the models' names, and titled rows."""
    evaluation: pl.DataFrame | None
    """prompt_id, model, sample_index, reward, quantile_reward, length, text: every scored sample."""
    ref_rewards: list[Floats]
    """Each prompt's reference rewards; of the held-out prompts where there are any."""
    interval_widths: Floats
    """Of the training completions' quantile rewards, 95%."""
    metrics: pl.DataFrame | None
    tables: dict[str, list[Comparison]] = field(default_factory=dict)


def gather(store: Store, run: str) -> Content:
    """Read the run's artifacts."""
    noted = store.run(run) or {}
    manifests = {}
    for stage in stages_of(noted) or ("prompts",):
        manifests[stage] = find_manifest(store, run, stage)
    config = parse_config(noted["config"])
    evaluation = _evaluation(store, manifests.get("evaluation"))
    ref_rewards, widths = _quantiles(store, manifests.get("quantiles"), evaluation)
    tables = {} if evaluation is None else _tables(evaluation, _prompts(store, manifests["prompts"]))
    summary = manifests["evaluation"].metadata.get("summary") if evaluation is not None else None
    return Content(
        name=run,
        config=config,
        config_text=yaml.safe_dump(noted["config"], sort_keys=False, allow_unicode=True),
        stages=[_stage(manifest, noted["stages"][name]) for name, manifest in manifests.items()],
        rejects=[row for manifest in manifests.values() for row in _rejects(store, manifest)],
        sources=_sources(manifests),
        summary=summary,
        comparison=comparison_table(summary) if summary else None,
        evaluation=evaluation,
        ref_rewards=ref_rewards,
        interval_widths=widths,
        metrics=_metrics(store, manifests.get("policy")),
        tables=tables,
    )


def _stage(manifest: Manifest, noted: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": manifest.stage,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "rejects": manifest.rejects,
        "bytes": manifest.bytes,
        "computed": noted.get("parts_computed", 0),
        "cached": noted.get("parts_cached", 0),
        "seconds": manifest.seconds,
        "work": sum(part.seconds for part in manifest.parts),
        "created": manifest.created,
        "parents": ", ".join(f"{name} {parent[:8]}" for name, parent in manifest.parents.items()),
        "code_version": manifest.code_version,
    }


def _sources(manifests: Mapping[str, Manifest]) -> list[tuple[str, str]]:
    """Everything from outside that went into the run: what it is, and its digest or name."""
    found: dict[tuple[str, str], None] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{path} {key}", item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(path, item)
        elif value is not None:
            found[path, str(value)] = None

    for stage, manifest in manifests.items():
        walk(stage, dict(manifest.inputs))
    return list(found)


def _rejects(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        if part.rejects:
            counts.update(store.read_rejects(part)["reason"].to_pylist())
    return [
        {"stage": manifest.stage, "reason": reason[:_TEXT], "count": count}
        for reason, count in counts.most_common(_ROWS)
    ]


def _evaluation(store: Store, manifest: Manifest | None) -> pl.DataFrame | None:
    if manifest is None or not manifest.rows:
        return None
    wanted = ["prompt_id", "model", "sample_index", "reward", "quantile_reward"]
    rows = store.scan(manifest.parts).select(
        *wanted, pl.col("token_ids").list.len().alias("length"), pl.col("text")
    )
    return rows.filter(pl.col("reward").is_not_null()).collect()


def _quantiles(
    store: Store, manifest: Manifest | None, evaluation: pl.DataFrame | None
) -> tuple[list[Floats], Floats]:
    if manifest is None or not manifest.rows:
        return [], np.empty(0)
    scan = store.scan(manifest.parts)
    rows = scan
    if evaluation is not None:
        rows = rows.filter(pl.col("prompt_id").is_in(evaluation["prompt_id"].unique().to_list()))
    lists = rows.select("ref_rewards").head(_PROMPTS).collect()["ref_rewards"].to_list()
    bounds = scan.select("quantile_low", "quantile_high").head(_PROMPTS).collect()
    low, high = ([value for some in bounds[name].to_list() for value in some] for name in bounds.columns)
    widths = np.array(high, dtype=float) - np.array(low, dtype=float)
    return [np.array(rewards, dtype=float) for rewards in lists], widths


def _metrics(store: Store, manifest: Manifest | None) -> pl.DataFrame | None:
    if manifest is None or not manifest.parts:
        return None
    path = store.fetch_folder(manifest.parts[0]) / "metrics.parquet"
    return pl.read_parquet(path) if path.is_file() else None


def _prompts(store: Store, manifest: Manifest) -> dict[str, str]:
    rows = store.scan(manifest.parts).filter(pl.col("split") == "eval").select("prompt_id", "messages")
    return {
        prompt_id: "\n\n".join(
            message["content"] if len(messages) == 1 else f"{message['role']}: {message['content']}"
            for message in messages
        )
        for prompt_id, messages in rows.collect().iter_rows()
    }


def _tables(evaluation: pl.DataFrame, prompts: Mapping[str, str]) -> dict[str, list[Comparison]]:
    """The policy's best and worst completions, and the prompts whose mean reward changed most, either way."""
    keys = ["prompt_id", "sample_index"]
    policy, reference = (
        evaluation.filter(pl.col("model") == name).select(
            *keys, pl.struct("text", "reward", "quantile_reward", "length").alias(name)
        )
        for name in ("policy", "reference")
    )
    means = evaluation.group_by("prompt_id", "model").agg(pl.col("reward").mean()).sort("prompt_id")
    change = (
        means.filter(pl.col("model") == "policy")
        .join(means.filter(pl.col("model") == "reference"), on="prompt_id")
        .select("prompt_id", (pl.col("reward") - pl.col("reward_right")).alias("change"))
    )
    pairs = policy.join(reference, on=keys).join(change, on="prompt_id").sort(*keys)
    reward = pl.col("policy").struct.field("reward")
    change_here = reward - pl.col("reference").struct.field("reward")
    typical = pairs.sort((change_here - pl.col("change")).abs(), maintain_order=True)
    orders = {
        "best": pairs.sort(reward, descending=True, maintain_order=True),
        "worst": pairs.sort(reward, maintain_order=True),
        "gained most": typical.filter(pl.col("change") > 0).sort(
            "change", descending=True, maintain_order=True
        ),
        "lost most": typical.filter(pl.col("change") < 0).sort("change", maintain_order=True),
    }
    tables = {}
    for name, rows in orders.items():
        first = rows.unique("prompt_id", keep="first", maintain_order=True).head(_ROWS)
        tables[name] = [_comparison(row, prompts) for row in first.iter_rows(named=True)]
    return {name: rows for name, rows in tables.items() if rows}


def _comparison(row: Mapping[str, Any], prompts: Mapping[str, str]) -> Comparison:
    reference, policy = ({**row[name], "text": _short(row[name]["text"])} for name in ("reference", "policy"))
    return Comparison(
        _short(prompts.get(row["prompt_id"], row["prompt_id"])), reference, policy, row["change"]
    )


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} … ({len(text) - _TEXT:,} characters more)"
