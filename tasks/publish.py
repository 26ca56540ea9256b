"""What a finished stage shows in Prefect: an asset with its lineage, and artifacts that a person
reads in the UI.

The manifest in the store is the truth and this is a view of it: an unreachable server loses the
view, not the run.

| in the UI | what |
|---|---|
| asset event | key: the artifact's URL; upstream: its parents' URLs; rows, bytes, rejects, ... |
| markdown | its sources, numbers of every numeric column, reject reasons, commands |
| table | a few rows as they are |
| image | rewards, quantiles, lengths, the training curve |
"""

import base64
import json
import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import polars as pl
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.utilities.annotations import quote

from storage import Manifest, Store
from tasks import charts
from tasks.artifact_summary import MAIN_MEASURES, compare_models, numbers_of, reject_reasons, training_metrics
from tasks.retries import NO_RESULT
from tasks.run_stage import StageResult
from tasks.stages import STAGES

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

log = logging.getLogger("qrpo")

_SAMPLE_ROWS = 20
_CELL = 200  # characters; the server's database keeps every table
_FORBIDDEN_IN_KEYS = re.compile(r"[\s#?&%\"'<>\[\]{}|\\^`]")


def publish_stage(result: StageResult, config: "PipelineConfig", store_url: str) -> None:
    """Show the stage's artifact in the UI of the current flow run. Does nothing outside of one."""
    if FlowRunContext.get() is None:
        return
    store = Store(store_url)
    manifest = store.manifest(result.stage, result.fingerprint)
    if manifest is None:
        log.warning(
            "%s is done, but its manifest cannot be read, so Prefect's UI does not show it", result.stage
        )
        return
    parents = [_url(store, stage, fingerprint) for stage, fingerprint in manifest.parents.items()]
    task = _publish.with_options(
        task_run_name=f"publish {result.stage}",
        assets=[_asset(manifest, store)],
        asset_deps=[asset_key(url) for url in parents],
    )
    shown: Any = quote((manifest, result, config, store))
    state = task(shown, return_state=True)
    if state.is_failed():
        log.warning("%s is done, but could not be shown in Prefect's UI: %s", result.stage, state.message)


def asset_key(url: str) -> str:
    """The artifact's URL as a key of a Prefect asset: with a scheme, without the characters that
    Prefect refuses."""
    with_scheme = url if "://" in url else f"file://{url}"
    return _FORBIDDEN_IN_KEYS.sub("-", with_scheme)[:512]


def artifact_key(*words: str) -> str:
    """A key for a Prefect artifact: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


@materialize(
    "qrpo://artifact",  # `publish_stage` replaces it with the manifest's key
    name="publish",
    description="Show the stage's artifact in Prefect: asset, summary, sample rows, chart.",
    cache_policy=NO_CACHE,
    **NO_RESULT,
    log_prints=False,
)
def _publish(shown: tuple[Manifest, StageResult, "PipelineConfig", Store]) -> None:
    manifest, result, config, store = shown
    stage = manifest.stage
    facts = ("stage", "fingerprint", "rows", "bytes", "rejects", "seconds", "code_version")
    metadata = {name: getattr(manifest, name) for name in facts}
    metadata |= {"run": config.name, "parts": len(manifest.parts), "inputs": dict(manifest.inputs)}
    add_asset_metadata(_asset(manifest, store), metadata)
    create_markdown_artifact(
        _summary(manifest, result, config, store),
        key=artifact_key(config.name, stage),
        description=f"{stage} of run {config.name}: {manifest.rows:,} {STAGES[stage].unit}",
    )
    if not result.parts_computed:
        return  # the charts of the run that computed it are still there, under the same keys
    if rows := _sample(manifest, store):
        key = artifact_key(config.name, stage, "rows")
        create_table_artifact(rows, key=key, description=f"The first {len(rows)} rows of {stage}")
    if chart := charts.draw(manifest, store):
        title, png = chart
        image = "data:image/png;base64," + base64.b64encode(png).decode()
        create_image_artifact(image, key=artifact_key(config.name, stage, "chart"), description=title)


def _url(store: Store, stage: str, fingerprint: str) -> str:
    return store.url_of(f"artifacts/{stage}/{fingerprint}")


def _asset(manifest: Manifest, store: Store) -> Asset:
    url = _url(store, manifest.stage, manifest.fingerprint)
    properties = AssetProperties(
        name=f"{manifest.stage} {manifest.fingerprint[:12]}",
        url=url if "://" in url else f"file://{url}",
        description=f"{manifest.rows:,} {STAGES[manifest.stage].unit} in {len(manifest.parts)} parts",
    )
    return Asset(key=asset_key(url), properties=properties)


def _summary(manifest: Manifest, result: StageResult, config: "PipelineConfig", store: Store) -> str:
    """The artifact as a page of Markdown."""
    name, stage = config.name, manifest.stage
    if result.parts_computed:
        done = f"{result.parts_computed} parts computed in {result.seconds:.1f} s, {result.parts_cached} from the store."
    elif result.parts_cached:
        done = f"Nothing to compute: all {result.parts_cached} parts are in the store."
    else:
        done = "Nothing to do for this configuration."
    parents = ", ".join(f"{parent} `{found[:12]}`" for parent, found in manifest.parents.items())
    facts = {
        STAGES[stage].unit: f"{manifest.rows:,}",
        "rejects": f"{manifest.rejects:,}",
        "bytes": f"{manifest.bytes:,}",
        "fingerprint": f"`{manifest.fingerprint}`",
        "made from": parents or config.prompts.source,
        "stored in": f"`{_url(store, stage, manifest.fingerprint)}`",
    }
    lines = [f"# {stage} of run {name}", "", done, *_table(("", ""), facts.items())]
    if result.parts_computed:
        lines += _numbers(manifest, store)
        reasons = reject_reasons(store, manifest)
        lines += _table(("reason of rejects", "rows"), reasons.items())
    if stage == "evaluation" and "summary" in manifest.metadata:
        summary = manifest.metadata["summary"]
        models, rows = compare_models(summary)
        main = [(title, *cells) for title, cells in rows.items() if title in MAIN_MEASURES]
        lines += _table((f"{summary['prompts']} held-out prompts", *models), main)
    lines += ["", "Look further on a machine that reaches the store:", ""]
    lines += [f"    qrpo {command} {name} {stage} --store {store.url}" for command in ("inspect", "show")]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    """The lines of a Markdown table; none without rows."""
    for number, row in enumerate(rows):
        if number == 0:
            yield from ("", "| " + " | ".join(head) + " |", "|" + "---|" * len(head))
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _numbers(manifest: Manifest, store: Store) -> Iterator[str]:
    """Mean, standard deviation and range of every numeric column."""
    if any(part.table for part in manifest.parts):
        table = store.scan(manifest.parts)
    else:
        metrics = training_metrics(store, manifest)
        table = (pl.DataFrame() if metrics is None else metrics).lazy()
    names = [name for name, kind in table.collect_schema().items() if kind.is_numeric()]
    columns = {name: numbers_of(table.select(name).collect()[name]) for name in names}
    keys = ("mean", "std", "min", "max")
    rows = [
        (name, *("" if known[key] is None else f"{known[key]:.5g}" for key in keys))
        for name, known in columns.items()
        if known is not None
    ]
    return _table(("column", *keys), rows)


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
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
