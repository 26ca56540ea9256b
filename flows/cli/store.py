"""Commands that read, check and clean the store."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.app import (
    AsJson,
    RunName,
    StageName,
    StoreUrl,
    Trust,
    command,
    err,
    out,
    print_json,
    print_result,
)


@command("ls")
def list_store(store: StoreUrl = "artifacts", as_json: AsJson = False) -> None:
    """List the runs in the store, with the artifacts of each.

    Example: qrpo ls --store s3://bucket/qrpo
    """
    from flows.views.show import list_runs, runs_table
    from storage import Store

    runs = list_runs(Store(store))
    print_result(runs, runs_table(runs), as_json)


@command()
def show(name: RunName, stage: StageName, store: StoreUrl = "artifacts", as_json: AsJson = False) -> None:
    """Show one artifact: its contents, its inputs, and the paths of its Parquet files.

    Examples:

      qrpo show demo rewards

      qrpo show config.yaml policy --json
    """
    from flows.views.show import artifact_table, describe
    from storage import Store

    described = describe(Store(store), name, stage)
    print_result(described, artifact_table(described), as_json)


@command()
def inspect(
    name: RunName,
    stage: StageName,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="SQL", help='Only rows that match: --where "reward > 0.9"'),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option("--sort", metavar="COLUMN", help="Sort by a column; -COLUMN sorts descending."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows to show (5), or to export (all).")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="A,B", help="Only these columns.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="SEED", help="Rows drawn at random.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Read every row instead of estimating.")] = False,
    prompt_id: Annotated[
        str | None, typer.Option("--prompt-id", help="Follow one prompt through every stage.")
    ] = None,
    diff: Annotated[
        str | None, typer.Option("--diff", metavar="OTHER_RUN", help="What changed since that run.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write the rows into FILE.{parquet,jsonl,csv}."),
    ] = None,
    hub: Annotated[
        str | None,
        typer.Option("--hub", metavar="ORG/NAME", help="Push the rows as a private Hugging Face dataset."),
    ] = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Show columns, distributions, rows and rejects of a stage, or one prompt through all stages.

    Examples:

      qrpo inspect demo completions --where "finish_reason = 'length'" --sample 1

      qrpo inspect demo rewards --sort=-reward --limit 20 --columns reward,prompt_id

      qrpo inspect demo rewards --prompt-id 3f2a

      qrpo inspect demo rewards --where "reward > 0.9" --export best.parquet
    """
    from flows.views.inspect.command import InspectOptions, answer

    wanted = columns.split(",") if columns else None
    options = InspectOptions(
        name, stage, where, sort, sample, limit, exact, wanted, prompt_id, diff, export, hub
    )
    found, show = answer(store, options)
    print_json(found) if as_json else show(out)


@command()
def browse(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8421,
    token: Annotated[
        str | None,
        typer.Option(
            "--token", envvar="QRPO_BROWSE_TOKEN", help="The token to require. Default: a generated one."
        ),
    ] = None,
    store: StoreUrl = "artifacts",
) -> None:
    """Serve a read-only web page of the store: runs, rows, distributions, prompts, two runs side by side."""
    from flows.views.browse.server import serve
    from storage import Store

    serve(Store(store), host=host, port=port, token=token, say=out.print)


@command()
def verify(
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Delete damaged parts and let the runs that need them compute them again."
        ),
    ] = False,
    trust: Trust = False,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Check every file of the store: sha256, row counts, schemas, records, manifests. Exit code 1 if anything is wrong.

    Examples:

      qrpo verify

      qrpo verify --repair --store s3://bucket/qrpo
    """
    from flows.housekeeping import check_store
    from storage import Store

    checked = check_store(Store(store), err, repairing=repair, trust=trust)
    left = checked["left"] if "left" in checked else checked["findings"]
    if as_json:
        print_json(checked)
    else:
        for finding in checked["findings"]:
            out.print(f"{finding['kind']}: {finding['message']}")
        for line in checked.get("left", []):
            out.print(f"left: {line}")
        repaired = f", {len(checked['dropped'])} repaired" if "dropped" in checked else ""
        out.print(f"{len(checked['findings'])} faults in {checked['store']}{repaired}")
    if left:
        raise typer.Exit(1)


@command()
def gc(
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="RUN", help="Keep this run; remove others.")
    ] = None,
    newest: Annotated[int | None, typer.Option("--newest", min=0, help="Keep the N newest runs.")] = None,
    days: Annotated[
        float | None, typer.Option("--days", min=0.0, help="Keep runs younger than N days.")
    ] = None,
    versions: Annotated[
        int | None,
        typer.Option(
            "--versions", min=1, help="Of a run whose configuration changed, keep the N newest versions."
        ),
    ] = None,
    grace: Annotated[float, typer.Option("--grace", min=0.0, help="Keep files younger than N hours.")] = 1.0,
    unfinished: Annotated[
        bool,
        typer.Option(
            "--unfinished",
            help="Also remove the parts of unfinished stages, except those that a kept or live run needs.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove the files; without it, only list them.")] = False,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Remove artifacts that no run references. Keeps every named run unless a rule is given. Removes nothing without --yes.

    Examples:

      qrpo gc --newest 5

      qrpo gc --days 30 --keep baseline --yes
    """
    from flows.housekeeping import clean_store, describe_gc, print_gc
    from storage import Store

    max_age = None if days is None else days * 86_400
    planned = clean_store(
        Store(store),
        remove=yes,
        keep_runs=keep or (),
        newest=newest,
        max_age=max_age,
        grace=grace * 3600,
        unfinished=unfinished,
        versions=versions,
    )
    if as_json:
        print_json({**describe_gc(planned), "removed": yes})
    else:
        print_gc(planned, out, done=yes)
