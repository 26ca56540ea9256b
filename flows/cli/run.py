"""Commands that compute, or say what would be computed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.app import (
    AsJson,
    ConfigPath,
    Overrides,
    StoreUrl,
    command,
    complete_stage,
    err,
    known_stage,
    out,
    print_json,
    tell,
)
from tasks.stages import STAGE_NAMES


@command()
def demo(store: StoreUrl = "artifacts", as_json: AsJson = False) -> None:
    """The whole pipeline on this machine in minutes: builds a small model and a task, nothing to download.

    Example: qrpo demo, then qrpo inspect demo rewards
    """
    from flows.cli.demo import demo_config

    _run(demo_config(Path("demo")), store, as_json=as_json)


@command()
def run(
    config: ConfigPath,
    first: Annotated[
        str | None,
        typer.Option(
            "--from",
            autocompletion=complete_stage,
            callback=known_stage,
            help="Start with this stage; those before must be complete.",
        ),
    ] = None,
    last: Annotated[
        str | None,
        typer.Option(
            "--until", autocompletion=complete_stage, callback=known_stage, help="Stop after this stage."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", autocompletion=complete_stage, callback=known_stage, help="Run this stage alone."
        ),
    ] = None,
    overrides: Overrides = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            "--force",
            metavar="STAGE",
            autocompletion=complete_stage,
            callback=known_stage,
            help="Compute this stage again even where it is cached.",
        ),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the whole configuration and stop.")
    ] = False,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Run the stages of CONFIG; what the store already has is not computed again.

    Examples:

      qrpo run config.yaml

      qrpo run config.yaml --until rewards --set completions.num_ref=50

      qrpo run config.yaml --only policy --set policy.beta=0.05
    """
    from tasks.config import dump_config, load_config

    loaded = load_config(config, overrides or ())
    if show_config:
        out.print(dump_config(loaded), end="")
        return
    if only is not None and (first is not None or last is not None):
        raise typer.BadParameter("--only STAGE stands alone: it means --from STAGE --until STAGE")
    if first and last and STAGE_NAMES.index(first) > STAGE_NAMES.index(last):
        raise typer.BadParameter(f"--from {first} comes after --until {last}, so no stage is left to run")
    _run(
        loaded,
        store,
        first=only or first or STAGE_NAMES[0],
        last=only or last or STAGE_NAMES[-1],
        force=tuple(force or ()),
        as_json=as_json,
    )


@command()
def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    write: Annotated[
        Path | None, typer.Option("--out", help="Also write the report into this JSON file.")
    ] = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Train every method of the section `compare` over its grid and seeds, and report each method's best.

    All share their samples, rewards and held-out prompts; what the store already has is not trained again.

    Example: qrpo compare examples/compare/config.yaml --out comparison.json
    """
    from tasks.config import load_config

    loaded = load_config(config, overrides or ())
    from flows.service.server import start_server

    server_answers = start_server()
    from flows.compare import compare as compare_methods
    from flows.compare import comparison_table

    server_answers()
    report = compare_methods(loaded, store)
    if write is not None:
        write.write_text(json.dumps(report, indent=1) + "\n")
    tell(report, comparison_table(report), as_json)


@command()
def plan(
    config: ConfigPath, overrides: Overrides = None, store: StoreUrl = "artifacts", as_json: AsJson = False
) -> None:
    """What `qrpo run` would compute, what is cached, and why. Runs nothing, writes nothing.

    Examples:

      qrpo plan config.yaml

      qrpo plan config.yaml --set completions.num_ref=50 --json
    """
    from flows.views.plan import preview, preview_table
    from storage import Store
    from tasks.config import load_config

    stages = preview(load_config(config, overrides or ()), Store(store))
    tell(stages, preview_table(stages), as_json)


def _run(
    config: Any,
    store: str,
    *,
    first: str = STAGE_NAMES[0],
    last: str = STAGE_NAMES[-1],
    force: tuple[str, ...] = (),
    as_json: bool,
) -> None:
    from flows.cli.launch import launch, print_summary

    summary = launch(config, store, first=first, last=last, force=force, console=err)
    if as_json:
        print_json(summary)
    else:
        print_summary(summary, out)
