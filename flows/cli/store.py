"""Commands on what the store has: look at it, check it, clean it up."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.app import AsJson, RunName, StageName, StoreUrl, command, err, out, print_json, tell


@command("ls")
def list_store(store: StoreUrl = "artifacts", as_json: AsJson = False) -> None:
    """The runs in the store, with the artifacts that each produced.

    Example: qrpo ls --store s3://bucket/qrpo
    """
    from flows.views.show import list_runs, runs_table
    from storage import Store

    runs = list_runs(Store(store))
    tell(runs, runs_table(runs), as_json)


@command()
def show(name: RunName, stage: StageName, store: StoreUrl = "artifacts", as_json: AsJson = False) -> None:
    """One artifact: what it is, what made it, and where its Parquet files lie.

    Examples:

      qrpo show demo rewards

      qrpo show config.yaml policy --json
    """
    from flows.views.show import artifact_table, describe
    from storage import Store

    described = describe(Store(store), name, stage)
    tell(described, artifact_table(described), as_json)


@command()
def inspect(
    name: RunName,
    stage: StageName,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="SQL", help='Only rows for which this holds: --where "reward > 0.9"'),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option("--sort", metavar="COLUMN", help="Sort by a column; -COLUMN: greatest first."),
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
    exact: Annotated[
        bool, typer.Option("--exact", help="Read every row where an estimate would come sooner.")
    ] = False,
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
    """Look at the data: columns, distributions, rows and rejects of a stage, or one prompt through all of them.

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
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; any but loopback asks for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8421,
    token: Annotated[
        str | None,
        typer.Option(
            "--token", envvar="QRPO_BROWSE_TOKEN", help="The token to ask for; made up where needed."
        ),
    ] = None,
    store: StoreUrl = "artifacts",
) -> None:
    """The store in a web page: runs, rows, distributions, prompts, two runs side by side. Read-only."""
    from flows.views.browse.server import serve
    from storage import Store

    serve(Store(store), host=host, port=port, token=token, say=out.print)


@command()
def verify(
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Drop what is damaged and let the runs that need it compute it again."),
    ] = False,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Check every file of the store: sha256, row counts, schemas, records, manifests. Exit code 1 where anything is wrong.

    Examples:

      qrpo verify

      qrpo verify --repair --store s3://bucket/qrpo
    """
    from flows.housekeeping import check_store
    from storage import Store

    checked = check_store(Store(store), err, mend=repair)
    left = checked["left"] if "left" in checked else checked["findings"]
    if as_json:
        print_json(checked)
    else:
        for finding in checked["findings"]:
            out.print(f"{finding['kind']}: {finding['message']}")
        mended = f", {len(checked['dropped'])} repaired" if "dropped" in checked else ""
        out.print(f"{len(checked['findings'])} faults in {checked['store']}{mended}")
    if left:
        raise typer.Exit(1)


@command()
def gc(
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="RUN", help="Keep this run; others go.")
    ] = None,
    newest: Annotated[
        int | None, typer.Option("--newest", min=0, help="Keep the newest so many runs.")
    ] = None,
    days: Annotated[
        float | None, typer.Option("--days", min=0.0, help="Keep runs younger than so many days.")
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0.0, help="Leave alone what is younger than so many hours.")
    ] = 1.0,
    yes: Annotated[
        bool, typer.Option("--yes", help="Really remove; without it, only say what would go.")
    ] = False,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Remove what no run needs. Without a rule every named run is kept, and nothing goes without --yes.

    Examples:

      qrpo gc --newest 5

      qrpo gc --days 30 --keep baseline --yes
    """
    from flows.housekeeping import clean_store, describe_gc, print_gc
    from storage import Store

    max_age = None if days is None else days * 86_400
    rules = {"keep_runs": keep or (), "newest": newest, "max_age": max_age, "grace": grace * 3600}
    planned = clean_store(Store(store), remove=yes, **rules)
    if as_json:
        print_json({**describe_gc(planned), "removed": yes})
    else:
        print_gc(planned, out, done=yes)
