"""Commands that read, check and clean the store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from flows.cli.app import Answer, RunName, StageName, Trust, command, out

if TYPE_CHECKING:
    from storage import Store


@command("ls")
def list_store(
    store: "Store", long: Annotated[bool, Option("-l", "--long", help="One line per stage.")] = False
) -> Answer:
    """List the runs in the store.

    Example: qrpo ls -l --store s3://bucket/qrpo
    """
    from flows.views.show import list_runs, runs_table, stages_table

    runs = list_runs(store)
    return Answer(runs, (stages_table if long else runs_table)(runs))


@command()
def show(name: RunName, stage: StageName, store: "Store") -> Answer:
    """Show one artifact: its contents, its inputs, and the paths of its Parquet files.

    Examples:

      qrpo show demo rewards

      qrpo show config.yaml policy --json
    """
    from flows.views.show import artifact_table, describe

    described = describe(store, name, stage)
    return Answer(described, artifact_table(described))


@command()
def inspect(
    name: RunName,
    stage: StageName,
    store: "Store",
    where: Annotated[
        str | None, Option(metavar="SQL", help='Only rows that match: --where "reward > 0.9"')
    ] = None,
    sort: Annotated[
        str | None, Option(metavar="COLUMN", help="Sort by a column; -COLUMN sorts descending.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Rows to show (5), or to export (all).")] = None,
    columns: Annotated[str | None, Option(metavar="A,B", help="Only these columns.")] = None,
    sample: Annotated[int | None, Option(min=1, metavar="N", help="Draw N rows at random.")] = None,
    seed: Annotated[int, Option(help="Seed of --sample.")] = 0,
    exact: Annotated[bool, Option("--exact", help="Read every row instead of estimating.")] = False,
    prompt_id: Annotated[str | None, Option(help="Follow one prompt through every stage.")] = None,
    diff: Annotated[str | None, Option(metavar="OTHER_RUN", help="What changed since that run.")] = None,
    export: Annotated[
        Path | None, Option(metavar="FILE", help="Write the rows into FILE.{parquet,jsonl,csv}.")
    ] = None,
    hub: Annotated[
        str | None, Option(metavar="ORG/NAME", help="Push the rows as a private Hugging Face dataset.")
    ] = None,
) -> Answer:
    """Show columns, distributions, rows and rejects of a stage, or one prompt through all stages.

    Examples:

      qrpo inspect demo completions --where "finish_reason = 'length'" --sample 3

      qrpo inspect demo rewards --sort=-reward --limit 20 --columns reward,prompt_id

      qrpo inspect demo rewards --prompt-id 3f2a

      qrpo inspect demo rewards --where "reward > 0.9" --export best.parquet
    """
    from flows.views.inspect.command import answer
    from flows.views.inspect.rows import Query

    if sample is not None and limit is not None:
        raise typer.BadParameter("--sample N and --limit N both say how many rows: give one of them")
    chosen = columns.split(",") if columns else None
    wanted = Query(where, None, sort, None if sample is None else seed, chosen, sample or limit)
    modes = {"prompt_id": prompt_id, "diff": diff, "export": export, "hub": hub}
    return Answer(*answer(store, name, stage, wanted, exact=exact, **modes))


@command()
def export(
    name: RunName,
    folder: Annotated[Path, Argument(metavar="DIR", help="A new folder for the model.")],
    store: "Store",
) -> Answer:
    """Copy the trained model of a run into a folder, as `transformers` and vLLM load it.

    Example: qrpo export demo ./my-model
    """
    from flows.views.runs import export_model, run_name

    done = export_model(store, run_name(name), folder)
    return Answer(done, f"model of run {done['run']} in {folder}; serve it with: vllm serve {folder}")


@command(shared=("store", "debug"))
def browse(
    store: "Store",
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free one.")] = 8421,
    token: Annotated[
        str | None,
        Option(envvar="QRPO_BROWSE_TOKEN", help="The token to require. Default: a generated one."),
    ] = None,
) -> None:
    """Serve a read-only web page of the store: runs, rows, distributions, prompts, two runs side by
    side."""
    from flows.views.browse.server import serve

    serve(store, host=host, port=port, token=token, say=out.print)


@command()
def verify(
    store: "Store",
    repair: Annotated[
        bool,
        Option("--repair", help="Delete damaged parts and let the runs that need them compute them again."),
    ] = False,
    trust: Trust = False,
) -> Answer:
    """Check every file of the store: sha256, row counts, schemas, records, manifests. Exit code 1
    if anything is wrong.

    Examples:

      qrpo verify

      qrpo verify --repair --store s3://bucket/qrpo
    """
    from flows.housekeeping import check_store, findings_text

    checked = check_store(store, repairing=repair, trust=trust)
    return Answer(checked, findings_text(checked), failed=bool(checked.get("left", checked["findings"])))


@command()
def gc(
    store: "Store",
    keep: Annotated[list[str] | None, Option(metavar="RUN", help="Keep this run; remove others.")] = None,
    newest: Annotated[int | None, Option(min=0, help="Keep the N newest runs.")] = None,
    days: Annotated[float | None, Option(min=0.0, help="Keep runs younger than N days.")] = None,
    versions: Annotated[
        int | None, Option(min=1, help="Of a run whose configuration changed, keep the N newest versions.")
    ] = None,
    grace: Annotated[float, Option(min=0.0, help="Keep files younger than N hours.")] = 1.0,
    unfinished: Annotated[
        bool,
        Option(
            "--unfinished",
            help="Also remove the parts of unfinished stages, except those that a kept or live run needs.",
        ),
    ] = False,
    yes: Annotated[bool, Option("--yes", help="Remove the files; without it, only list them.")] = False,
) -> Answer:
    """Remove artifacts that no run references. Keeps every named run unless a rule is given.
    Removes nothing without --yes.

    Examples:

      qrpo gc --newest 5

      qrpo gc --days 30 --keep baseline --yes
    """
    from flows.housekeeping import clean_store, describe_gc, gc_text

    planned = clean_store(
        store,
        remove=yes,
        keep_runs=keep or (),
        newest=newest,
        max_age=None if days is None else days * 86_400,
        grace=grace * 3600,
        unfinished=unfinished,
        versions=versions,
    )
    return Answer({**describe_gc(planned), "removed": yes}, gc_text(planned, done=yes))
