"""What the report says: read from the store, cut to what a page can show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import yaml

from flows.views.runs import RunArtifacts, flatten
from qrpo.evaluation.statistics import Floats
from storage import Manifest, Store
from tasks.artifact_summary import Cell, compare_models, reject_reasons, training_metrics
from tasks.config import PipelineConfig, parse_config

_ROWS = 8  # of each table of completions
_TEXT = 2_000  # characters of a prompt or completion
_PROMPTS = 2_000  # prompts whose reference rewards are drawn


@dataclass(frozen=True)
class Content:
    """Everything that the page shows. What a run has not produced is None or empty."""

    name: str
    config: PipelineConfig
    config_text: str
    manifests: dict[str, Manifest]
    noted: dict[str, Any]
    """Stage -> what the run noted of it, such as `parts_computed`."""
    rejects: list[dict[str, Any]]
    sources: dict[str, str]
    """What went into the run from outside -> its digest or name."""
    summary: dict[str, Any] | None
    comparison: tuple[list[str], dict[str, list[Cell]]] | None
    """The summary as a table: the models' names, and titled rows."""
    evaluation: pl.DataFrame | None
    """prompt_id, model, sample_index, reward, quantile_reward, length, text: every scored
    sample."""
    ref_rewards: list[Floats]
    """Each prompt's reference rewards; of the held-out prompts if there are any."""
    interval_widths: Floats
    """Of the training completions' quantile rewards, 95%."""
    metrics: pl.DataFrame | None
    tables: dict[str, list[dict[str, Any]]]
    """Title -> prompts with a completion of each model (`prompt`, `reference`, `policy`,
    `change`)."""


def gather(store: Store, run: str) -> Content:
    """Read the run's artifacts. Raises ConfigError or DataError if there is no such run, or nothing
    in it."""
    artifacts = RunArtifacts(store, run)
    manifests = {stage: artifacts.manifest(stage) for stage in artifacts.stages or ("prompts",)}
    evaluation = _evaluation(store, manifests.get("evaluation"))
    ref_rewards, widths = _quantiles(store, manifests.get("quantiles"), evaluation)
    summary = manifests["evaluation"].metadata.get("summary") if evaluation is not None else None
    noted = artifacts.noted
    return Content(
        name=run,
        config=parse_config(noted["config"]),
        config_text=yaml.safe_dump(noted["config"], sort_keys=False, allow_unicode=True),
        manifests=manifests,
        noted=artifacts.stages,
        rejects=[
            {"stage": stage, "reason": reason[:_TEXT], "count": count}
            for stage, manifest in manifests.items()
            for reason, count in reject_reasons(store, manifest, _ROWS).items()
        ],
        sources={
            key: text.strip('"')
            for stage, manifest in manifests.items()
            for key, text in flatten(dict(manifest.inputs), stage).items()
            if text != "null"
        },
        summary=summary,
        comparison=compare_models(summary) if summary else None,
        evaluation=evaluation,
        ref_rewards=ref_rewards,
        interval_widths=widths,
        metrics=training_metrics(store, manifests["policy"]) if "policy" in manifests else None,
        tables={} if evaluation is None else _tables(evaluation, _prompts(store, manifests["prompts"])),
    )


def _evaluation(store: Store, manifest: Manifest | None) -> pl.DataFrame | None:
    if manifest is None or not manifest.rows:
        return None
    wanted = ["prompt_id", "model", "sample_index", "reward", "quantile_reward", "text"]
    rows = store.scan(manifest.parts).select(*wanted, length=pl.col("token_ids").list.len())
    return rows.filter(pl.col("reward").is_not_null()).collect()


def _quantiles(
    store: Store, manifest: Manifest | None, evaluation: pl.DataFrame | None
) -> tuple[list[Floats], Floats]:
    if manifest is None or not manifest.rows:
        return [], np.empty(0)
    rows = store.scan(manifest.parts)
    bounds = rows.select("quantile_low", "quantile_high").head(_PROMPTS).collect()
    low, high = (np.array(bounds[name].explode(empty_as_null=False), dtype=float) for name in bounds.columns)
    if evaluation is not None:
        rows = rows.filter(pl.col("prompt_id").is_in(evaluation["prompt_id"].unique().to_list()))
    lists = rows.select("ref_rewards").head(_PROMPTS).collect()["ref_rewards"].to_list()
    return [np.array(rewards, dtype=float) for rewards in lists], high - low


def _prompts(store: Store, manifest: Manifest) -> dict[str, str]:
    rows = store.scan(manifest.parts).filter(pl.col("split") == "eval").select("prompt_id", "messages")
    return {
        prompt_id: "\n\n".join(
            message["content"] if len(messages) == 1 else f"{message['role']}: {message['content']}"
            for message in messages
        )
        for prompt_id, messages in rows.collect().iter_rows()
    }


def _tables(evaluation: pl.DataFrame, prompts: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The policy's best and worst completions, and the prompts whose mean reward rose and fell
    most."""
    columns = ["text", "reward", "quantile_reward", "length"]
    policy, reference = (
        evaluation.filter(pl.col("model") == name).select(
            "prompt_id", "sample_index", pl.struct(columns).alias(name)
        )
        for name in ("policy", "reference")
    )
    gain = pl.col("policy").struct.field("reward") - pl.col("reference").struct.field("reward")
    mean = {
        model: pl.col("reward").filter(pl.col("model") == model).mean() for model in ("policy", "reference")
    }
    means = evaluation.group_by("prompt_id").agg(change=mean["policy"] - mean["reference"])
    pairs = policy.join(reference, on=["prompt_id", "sample_index"]).join(means, on="prompt_id")
    pairs = pairs.sort("prompt_id", "sample_index")
    typical = pairs.sort((gain - pl.col("change")).abs(), maintain_order=True)
    reward, change = pl.col("policy").struct.field("reward"), pl.col("change")
    orders = {
        "best": pairs.sort(reward, descending=True, maintain_order=True),
        "worst": pairs.sort(reward, maintain_order=True),
        "gained most": typical.filter(change > 0).sort(change, descending=True, maintain_order=True),
        "lost most": typical.filter(change < 0).sort(change, maintain_order=True),
    }
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, rows in orders.items():
        for row in rows.unique("prompt_id", keep="first", maintain_order=True).head(_ROWS).to_dicts():
            for model in ("reference", "policy"):
                row[model]["text"] = _short(row[model]["text"])
            row["prompt"] = _short(prompts.get(row["prompt_id"], row["prompt_id"]))
            tables.setdefault(title, []).append(row)
    return tables


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} … ({len(text) - _TEXT:,} characters more)"
