"""What a finished stage shows in Prefect: an asset with its lineage, and artifacts that a person reads without opening a file.

The manifest in the store holds the truth; this is a view of it. So a server that cannot be reached costs the view, not the run.

| in the UI | what |
|---|---|
| asset event | key: the artifact's URL; upstream: its parents' URLs; rows, bytes, rejects, fingerprint, parts, seconds |
| markdown | what was made of what, numbers of every column that has some, reasons of rejects, commands to look further |
| table | a few rows as they are |
| image | rewards, quantiles, lengths, the training curve |
"""

import base64
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import polars as pl
from httpx import HTTPError
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.utilities.annotations import quote

from storage import Manifest, Store
from tasks import charts
from tasks.run_stage import StageResult
from tasks.stages import STAGES

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

__all__ = ["artifact_key", "asset_key", "publish_stage"]

log = logging.getLogger("qrpo")

_SAMPLE_ROWS = 20
_LONGEST_TEXT = 200  # characters of a cell; the database of the server keeps every table
_FORBIDDEN_IN_KEYS = re.compile(r"[\s#?&%\"'<>\[\]{}|\\^`]")


def publish_stage(result: StageResult, config: "PipelineConfig", store_url: str) -> None:
    """Show what `result` tells of in the UI of the flow run at hand; without a flow run there is nothing to do."""
    if FlowRunContext.get() is None:
        return
    store = Store(store_url)
    manifest = store.manifest(result.stage, result.fingerprint)
    assert manifest is not None, f"{result.stage}: its manifest was committed a moment ago"
    task = _publish.with_options(
        task_run_name=f"publish {result.stage}",
        assets=[_asset(manifest, store)],
        asset_deps=[asset_key(manifest_url) for manifest_url in _parent_urls(manifest, store)],
    )
    shown: Any = quote((manifest, result, config, store))
    state = task(shown, return_state=True)
    if state.is_failed():
        log.warning("%s is done, but could not be shown in Prefect's UI: %s", result.stage, state.message)


def asset_key(url: str) -> str:
    """The artifact's URL as Prefect's assets want their keys: a scheme, and none of the characters that they refuse."""
    with_scheme = url if "://" in url else f"file://{url}"
    return _FORBIDDEN_IN_KEYS.sub("-", with_scheme)[:512]


def artifact_key(*words: str) -> str:
    """A key for a Prefect artifact: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


def _server_did_not_answer(task: Any, run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), HTTPError)


@materialize(
    "qrpo://artifact",  # the real key is known with the manifest, see `publish_stage`
    name="publish",
    description="Show the stage's artifact in Prefect: asset, summary, sample rows, picture.",
    cache_policy=NO_CACHE,
    persist_result=False,
    tags={"publish"},
    retries=2,
    retry_delay_seconds=[1.0, 5.0],
    retry_condition_fn=_server_did_not_answer,
    log_prints=False,
)
def _publish(shown: tuple[Manifest, StageResult, "PipelineConfig", Store]) -> None:
    manifest, result, config, store = shown
    add_asset_metadata(_asset(manifest, store), _metadata(manifest, config))
    create_markdown_artifact(
        _summary(manifest, result, config, store),
        key=artifact_key(config.name, manifest.stage),
        description=f"{manifest.stage} of run {config.name}: {manifest.rows:,} {STAGES[manifest.stage].unit}",
    )
    if not result.parts_computed:
        return  # the pictures of the run that computed it are still there, under the same keys
    rows = _sample(manifest, store)
    if rows:
        create_table_artifact(
            rows,
            key=artifact_key(config.name, manifest.stage, "rows"),
            description=f"The first {len(rows)} rows of {manifest.stage}",
        )
    chart = charts.draw(manifest, store)
    if chart is not None:
        title, png = chart
        create_image_artifact(
            "data:image/png;base64," + base64.b64encode(png).decode(),
            key=artifact_key(config.name, manifest.stage, "chart"),
            description=title,
        )


def _asset(manifest: Manifest, store: Store) -> Asset:
    url = store.url_of(manifest.key).removesuffix("/manifest.json")
    properties = AssetProperties(
        name=f"{manifest.stage} {manifest.fingerprint[:12]}",
        url=url if "://" in url else f"file://{url}",
        description=f"{manifest.rows:,} {STAGES[manifest.stage].unit} in {len(manifest.parts)} parts",
    )
    return Asset(key=asset_key(url), properties=properties)


def _parent_urls(manifest: Manifest, store: Store) -> list[str]:
    return [
        store.url_of(f"artifacts/{stage}/{fingerprint}") for stage, fingerprint in manifest.parents.items()
    ]


def _metadata(manifest: Manifest, config: "PipelineConfig") -> dict[str, Any]:
    return {
        "stage": manifest.stage,
        "run": config.name,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "rejects": manifest.rejects,
        "parts": len(manifest.parts),
        "seconds": manifest.seconds,
        "code_version": manifest.code_version,
        "inputs": dict(manifest.inputs),
    }


def _summary(manifest: Manifest, result: StageResult, config: "PipelineConfig", store: Store) -> str:
    """The artifact as a page."""
    name, stage = config.name, manifest.stage
    lines = [f"# {stage} of run {name}", ""]
    if result.parts_computed:
        how = f"{result.parts_computed} parts computed in {result.seconds:.1f} s, {result.parts_cached} from the store."
    elif result.parts_cached:
        how = f"Nothing to compute: all {result.parts_cached} parts are in the store."
    else:
        how = "Nothing to do for this configuration."
    lines += [how, ""]
    facts = {
        STAGES[stage].unit: f"{manifest.rows:,}",
        "cannot be used": f"{manifest.rejects:,}",
        "bytes": f"{manifest.bytes:,}",
        "fingerprint": f"`{manifest.fingerprint}`",
        "made from": ", ".join(f"{parent} `{found[:12]}`" for parent, found in manifest.parents.items())
        or config.prompts.source,
        "lies in": f"`{store.url_of(manifest.key).removesuffix('/manifest.json')}`",
    }
    lines += _table(("", ""), facts.items())
    if result.parts_computed:
        lines += _numbers(manifest, store)
        lines += _rejects(manifest, store)
    if stage == "evaluation" and "summary" in manifest.metadata:
        lines += _compared(manifest.metadata["summary"])
    lines += ["", "Look further on a machine that reaches the store:", ""]
    lines += [
        f"    qrpo inspect {name} {stage} --store {store.url}",
        f"    qrpo show {name} {stage} --store {store.url}",
    ]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield ("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")


def _numbers(manifest: Manifest, store: Store) -> list[str]:
    """Count, mean, spread and range of every column that holds numbers."""
    frame = charts.metrics_of(manifest, store).lazy()
    if any(part.table for part in manifest.parts):
        frame = store.scan(manifest.parts)
    schema = frame.collect_schema()
    names = [column for column, kind in schema.items() if kind.is_numeric()]
    if not names:
        return []
    of = {"mean": pl.Expr.mean, "std": pl.Expr.std, "min": pl.Expr.min, "max": pl.Expr.max}
    found = frame.select(
        *(
            function(pl.col(column)).alias(f"{column}/{word}")
            for column in names
            for word, function in of.items()
        )
    ).collect()
    values = found.to_dicts()[0]
    rows = (
        (column, *("" if (value := values[f"{column}/{word}"]) is None else f"{value:.5g}" for word in of))
        for column in names
    )
    return ["", *_table(("column", *of), rows)]


def _rejects(manifest: Manifest, store: Store) -> list[str]:
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        if part.rejects:
            counts.update(store.read_rejects(part)["reason"].to_pylist())
    if not counts:
        return []
    return ["", *_table(("why rows cannot be used", "rows"), counts.most_common(10))]


def _compared(summary: Mapping[str, Any]) -> list[str]:
    policy, reference, wins = summary["policy"], summary["reference"], summary["win_rate"]
    rows = [
        (what, f"{reference[key]['mean']:.4g}", f"{policy[key]['mean']:.4g}")
        for what, key in (
            ("mean reward", "reward"),
            ("mean quantile reward", "quantile_reward"),
            ("tokens", "length"),
        )
    ]
    rows.append(
        (
            "win rate against the reference",
            "0.5",
            f"{wins['mean']:.3f} ({wins['low']:.3f} to {wins['high']:.3f})",
        )
    )
    rows.append(("KL to the reference, nats", "0", f"{summary['kl']['mean']:.4g}"))
    return ["", *_table((f"{summary['prompts']} held-out prompts", "reference", "policy"), rows)]


def _sample(manifest: Manifest, store: Store) -> list[dict[str, str]]:
    if not manifest.rows or not any(part.table for part in manifest.parts):
        return []
    frame = store.scan(manifest.parts[:4]).head(_SAMPLE_ROWS).collect()
    return [{name: _cell(value) for name, value in row.items()} for row in frame.to_dicts()]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.5g}"
    elif isinstance(value, (list, dict)):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = "" if value is None else str(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
