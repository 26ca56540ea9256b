"""What a person finds in Prefect's UI after a run: names, tags, assets with lineage, summaries, tables, pictures, progress."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import Store
from tasks.publish import artifact_key, asset_key

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, write_task: Callable[..., Path], prefect_server: str
) -> dict[str, Any]:
    """A run through `policy`, called as plain Python; its folder, flow run and what it returned."""
    from flows import pipeline
    from tasks.config import load_config

    folder = tmp_path_factory.mktemp("shown")
    config = load_config(write_task(folder / "task", prompts=16, policy__num_train_epochs=1, name="Shown"))
    state = pipeline(config, str(folder / "store"), "prompts", "policy", return_state=True)
    assert state.is_completed(), state.message
    run_id = state.state_details.flow_run_id
    return {"folder": folder, "config": config, "id": run_id, "results": state.result()}


@pytest.fixture(scope="module")
def client(prefect_server: str) -> Any:
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def artifacts(client: Any) -> dict[str, Any]:
    found = client.request("POST", "/artifacts/latest/filter", json={"limit": 200}).json()
    return {artifact["key"]: artifact for artifact in found if str(artifact["key"]).startswith("shown")}


def test_run_names_say_which_prompts_and_model(ran: dict[str, Any], client: Any) -> None:
    run = client.read_flow_run(ran["id"])

    assert run.name == "Shown: prompts to policy (prompts.jsonl, model)"
    body = {"flow_runs": {"tags": {"all_": ["run:Shown"]}}}
    stages = client.request("POST", "/flow_runs/filter", json=body).json()
    assert {stage["name"] for stage in stages} >= {"Shown: rewards (prompts.jsonl, model)"}
    [rewards] = [stage["id"] for stage in stages if "rewards" in stage["name"]]
    body = {"flow_runs": {"id": {"any_": [rewards]}}}
    tasks = client.request("POST", "/task_runs/filter", json=body).json()
    assert {task["name"] for task in tasks} >= {"rewards 1/1", "publish rewards"}
    assert not any(task["tags"] for task in tasks), "for each tag Prefect asks the server for a slot"


def test_every_stage_has_a_summary_with_its_numbers(ran: dict[str, Any], client: Any) -> None:
    shown = artifacts(client)

    for result in ran["results"]:
        summary = shown[f"shown-{result.stage}"]
        assert summary["type"] == "markdown"
        assert result.fingerprint in summary["data"]
        assert f"{result.rows:,}" in summary["data"]
        assert "qrpo inspect Shown" in summary["data"]
    rewards = Store(ran["folder"] / "store")
    manifest = rewards.manifest(
        "rewards", next(r.fingerprint for r in ran["results"] if r.stage == "rewards")
    )
    assert manifest is not None
    mean = rewards.scan(manifest.parts).select("reward").collect()["reward"].mean()
    assert f"| reward | {mean:.5g} |" in shown["shown-rewards"]["data"]


def test_pictures_are_png_files_and_tables_have_rows(ran: dict[str, Any], client: Any) -> None:
    shown = artifacts(client)

    for stage in ("completions", "rewards", "quantiles", "policy"):
        header, _, data = shown[f"shown-{stage}-chart"]["data"].partition(",")
        assert header == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    for stage in ("prompts", "completions", "rewards", "quantiles", "shards"):
        assert '"prompt_id"' in shown[f"shown-{stage}-rows"]["data"]


def test_assets_carry_lineage_and_metadata(ran: dict[str, Any], client: Any) -> None:
    from prefect.events.filters import EventFilter, EventNameFilter

    store = Store(ran["folder"] / "store")
    results = {result.stage: result for result in ran["results"]}
    keys = {
        stage: asset_key(store.url_of(f"artifacts/{stage}/{result.fingerprint}"))
        for stage, result in results.items()
    }
    name = EventNameFilter(name=["prefect.asset.materialization.succeeded"])
    events = found_events(client, EventFilter(event=name), set(keys.values()))

    rewards = events[keys["rewards"]]
    assert rewards["resource"]["prefect.asset.url"].startswith("file:///")
    related = {item["prefect.resource.id"] for item in rewards["related"]}
    assert keys["completions"] in related
    assert keys["quantiles"] not in related
    assert rewards["payload"]["rows"] == results["rewards"].rows
    assert rewards["payload"]["fingerprint"] == results["rewards"].fingerprint
    assert {"bytes", "rejects", "parts", "seconds"} <= rewards["payload"].keys()


def found_events(client: Any, which: Any, keys: set[str]) -> dict[str, Any]:
    """The events about these assets, by asset; they reach the server a moment after the run's end."""
    import time

    deadline = time.monotonic() + 120
    while True:
        body = {"filter": which.model_dump(mode="json"), "limit": 50}
        answer = client.request("POST", "/events/filter", json=body)
        found = {event["resource"]["prefect.resource.id"]: event for event in answer.json()["events"]}
        if keys <= found.keys():
            return found
        assert time.monotonic() < deadline, f"missing: {keys - found.keys()}"
        time.sleep(0.5)


def test_cached_run_shows_its_summary_and_leaves_the_pictures(ran: dict[str, Any], client: Any) -> None:
    from flows import rewards

    before = artifacts(client)["shown-rewards-chart"]["id"]

    result = rewards(ran["config"], str(ran["folder"] / "store"))

    assert result.parts_computed == 0
    shown = artifacts(client)
    assert "Nothing to compute: all" in shown["shown-rewards"]["data"]
    assert shown["shown-rewards-chart"]["id"] == before


def test_progress_of_a_long_stage_is_in_the_ui(prefect_server: str, client: Any) -> None:
    import time

    from prefect import flow

    from tasks.progress import reporting

    @flow
    def long_stage() -> None:
        with reporting("completions", 4) as reporter:
            for part in range(1, 4):
                time.sleep(0.8)
                reporter.update(part, "sampling")  # the last one is not reported: the stage has ended

    state = long_stage(return_state=True)

    body = {"artifacts": {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}}
    [progress] = client.request("POST", "/artifacts/filter", json=body).json()
    assert progress["type"] == "progress"
    assert float(progress["data"]) == 100.0
    assert "completions: 4 of 4" in progress["description"]


def test_stage_run_outside_of_prefect_publishes_nothing(
    write_task: Callable[..., Path], tmp_path: Path, ran: dict[str, Any]
) -> None:
    from tasks.publish import publish_stage

    publish_stage(ran["results"][0], ran["config"], str(tmp_path))  # no such artifact, and nobody asks


def test_keys_hold_only_what_prefect_takes() -> None:
    assert artifact_key("Run_1.x", "rewards", "chart") == "run-1-x-rewards-chart"
    assert asset_key("/a b/c#1/[x]") == "file:///a-b/c-1/-x-"
    assert asset_key("s3://bucket/store/artifacts/rewards/12") == "s3://bucket/store/artifacts/rewards/12"
