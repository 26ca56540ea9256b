"""The `qrpo` command.

Standard output carries what was asked for (a table, or one JSON object with `--json`); progress and warnings go to standard error.
Exit codes: 0 done, 1 failed, 2 bad usage or configuration.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.environment import set_defaults
from flows.stage_order import STAGE_ORDER as _STAGES

__all__ = ["app", "main"]

app = typer.Typer(
    name="qrpo",
    help="Align language models to absolute rewards, stage by stage. Start with `qrpo demo`. "
    "`qrpo --install-completion` teaches the shell commands, options and stages.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# no markup: what models wrote is printed as it is
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _stages(incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [stage for stage in _STAGES if stage.startswith(incomplete)]


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML configuration.")]
StoreUrl = Annotated[
    str, typer.Option("--store", envvar="QRPO_STORE", help="Folder or fsspec URL of the store.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set policy.beta=0.1"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Cron = Annotated[
    str | None,
    typer.Option(
        "--cron", metavar="'M H D M W'", help="When to run the pipeline; by default never by itself."
    ),
]
Timezone = Annotated[str, typer.Option("--timezone", help="The schedule's time zone.")]
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="Runs that may use a GPU at the same time.")]
Notify = Annotated[
    str | None,
    typer.Option(
        "--notify", metavar="TYPE/NAME", help="Prefect notification block that is told of failures."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and every log line.")]


@app.command()
def demo(store: StoreUrl = "artifacts", as_json: AsJson = False, debug: Debug = False) -> None:
    """The whole pipeline on this machine in minutes: builds a small model and a task, nothing to download.

    Example: qrpo demo, then qrpo inspect demo rewards
    """
    with _errors_as_lines(debug):
        from flows.demo import demo_config

        _run(demo_config(Path("demo")), store, as_json=as_json)


@app.command()
def run(
    config: ConfigPath,
    first: Annotated[
        str | None,
        typer.Option(
            "--from", autocompletion=_stages, help="Start with this stage; those before must be complete."
        ),
    ] = None,
    last: Annotated[
        str | None, typer.Option("--until", autocompletion=_stages, help="Stop after this stage.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", autocompletion=_stages, help="Run this stage alone.")
    ] = None,
    overrides: Overrides = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            "--force",
            metavar="STAGE",
            autocompletion=_stages,
            help="Compute this stage again even where it is cached.",
        ),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the whole configuration and stop.")
    ] = False,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the stages of CONFIG; what the store already has is not computed again.

    Examples:

      qrpo run config.yaml

      qrpo run config.yaml --until rewards --set completions.num_ref=50

      qrpo run config.yaml --only policy --set policy.beta=0.05
    """
    with _errors_as_lines(debug):
        from tasks.config import dump_config, load_config

        loaded = load_config(config, overrides or ())
        if show_config:
            out.print(dump_config(loaded), end="")
            return
        if only is not None and (first is not None or last is not None):
            raise typer.BadParameter("--only STAGE stands alone: it means --from STAGE --until STAGE")
        for name in (first, last, only, *(force or ())):
            _check_stage(name)
        if first and last and _STAGES.index(first) > _STAGES.index(last):
            raise typer.BadParameter(f"--from {first} comes after --until {last}, so no stage is left to run")
        _run(
            loaded,
            store,
            first=only or first or _STAGES[0],
            last=only or last or _STAGES[-1],
            force=tuple(force or ()),
            as_json=as_json,
        )


@app.command()
def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    write: Annotated[
        Path | None, typer.Option("--out", help="Also write the report into this JSON file.")
    ] = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train every method of the section `compare` over its grid and seeds, and report each method's best.

    All share their samples, rewards and held-out prompts; what the store already has is not trained again.

    Example: qrpo compare examples/compare/config.yaml --out comparison.json
    """
    with _errors_as_lines(debug):
        from tasks.config import load_config

        loaded = load_config(config, overrides or ())
        from flows.server import start_server

        server_answers = start_server()
        from flows.compare import compare as compare_methods
        from flows.compare import comparison_table

        server_answers()
        report = compare_methods(loaded, store)
        if write is not None:
            write.write_text(json.dumps(report, indent=1) + "\n")
        _show(report, comparison_table(report), as_json)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What `qrpo run` would compute, what is cached, and why. Runs nothing, writes nothing.

    Examples:

      qrpo plan config.yaml

      qrpo plan config.yaml --set completions.num_ref=50 --json
    """
    with _errors_as_lines(debug):
        from flows.preview import preview, preview_table
        from storage import Store
        from tasks.config import load_config

        stages = preview(load_config(config, overrides or ()), Store(store))
        _show(stages, preview_table(stages), as_json)


@app.command(name="ls")
def list_store(store: StoreUrl = "artifacts", as_json: AsJson = False, debug: Debug = False) -> None:
    """The runs in the store, with the artifacts that each produced.

    Example: qrpo ls --store s3://bucket/qrpo
    """
    with _errors_as_lines(debug):
        from flows.show import list_runs, runs_table
        from storage import Store

        runs = list_runs(Store(store))
        _show(runs, runs_table(runs), as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or a configuration file.")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", autocompletion=_stages)],
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """One artifact: what it is, what made it, and where its Parquet files lie.

    Examples:

      qrpo show demo rewards

      qrpo show config.yaml policy --json
    """
    with _errors_as_lines(debug):
        from flows.show import artifact_table, describe
        from storage import Store

        _check_stage(stage)
        described = describe(Store(store), name, stage)
        _show(described, artifact_table(described), as_json)


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or a configuration file.")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", autocompletion=_stages)],
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
    debug: Debug = False,
) -> None:
    """Look at the data: columns, distributions, rows and rejects of a stage, or one prompt through all of them.

    Examples:

      qrpo inspect demo completions --where "finish_reason = 'length'" --sample 1

      qrpo inspect demo rewards --sort=-reward --limit 20 --columns reward,prompt_id

      qrpo inspect demo rewards --prompt-id 3f2a

      qrpo inspect demo rewards --where "reward > 0.9" --export best.parquet
    """
    with _errors_as_lines(debug):
        from flows.inspect.command import Asked, answer

        _check_stage(stage)
        wanted = columns.split(",") if columns else None
        asked = Asked(name, stage, where, sort, sample, limit, exact, wanted, prompt_id, diff, export, hub)
        found, show = answer(store, asked)
        _print_json(found) if as_json else show(out)


@app.command()
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
    debug: Debug = False,
) -> None:
    """The store in a web page: runs, rows, distributions, prompts, two runs side by side. Read-only."""
    with _errors_as_lines(debug):
        from flows.browse.server import serve
        from storage import Store

        serve(Store(store), host=host, port=port, token=token, say=out.print)


@app.command()
def verify(
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Drop what is damaged and let the runs that need it compute it again."),
    ] = False,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check every file of the store: sha256, row counts, schemas, records, manifests. Exit code 1 where anything is wrong.

    Examples:

      qrpo verify

      qrpo verify --repair --store s3://bucket/qrpo
    """
    with _errors_as_lines(debug):
        from flows.housekeeping import check_store
        from storage import Store

        checked = check_store(Store(store), err, mend=repair)
        left = checked["left"] if "left" in checked else checked["findings"]
        if as_json:
            _print_json(checked)
        else:
            for finding in checked["findings"]:
                out.print(f"{finding['kind']}: {finding['message']}")
            mended = f", {len(checked['dropped'])} repaired" if "dropped" in checked else ""
            out.print(f"{len(checked['findings'])} faults in {checked['store']}{mended}")
        if left:
            raise typer.Exit(1)


@app.command()
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
    debug: Debug = False,
) -> None:
    """Remove what no run needs. Without a rule every named run is kept, and nothing goes without --yes.

    Examples:

      qrpo gc --newest 5

      qrpo gc --days 30 --keep baseline --yes
    """
    with _errors_as_lines(debug):
        from flows.housekeeping import describe_gc, print_gc
        from storage import Store
        from storage.gc import collect, plan_gc

        opened = Store(store)
        max_age = None if days is None else days * 86_400
        planned = plan_gc(opened, keep_runs=keep or (), newest=newest, max_age=max_age, grace=grace * 3600)
        if yes:
            collect(opened, planned)
        if as_json:
            _print_json({**describe_gc(planned), "removed": yes})
        else:
            print_gc(planned, out, done=yes)


@app.command()
def theory(
    beta: Annotated[float, typer.Option("--beta", min=0.0, help="Strength of the KL penalty.")] = 0.1,
    transform: Annotated[
        str, typer.Option("--transform", help="f, applied to the quantile reward.")
    ] = "identity",
    num_ref: Annotated[int, typer.Option("--num-ref", min=1, help="Reference samples per prompt.")] = 50,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw it into this file (png, svg, pdf).")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What the optimum promises for a transform and beta, before any GPU time is spent.

    Example: qrpo theory --beta 0.1 --transform identity --num-ref 50 --plot theory.png
    """
    with _errors_as_lines(debug):
        from flows.theory import print_theory
        from qrpo.theory import plot_theory, summary, theory_table

        promised, by_num_ref = summary(transform, beta, num_ref), theory_table(transform, beta)
        if as_json:
            _print_json({**promised, "by_num_ref": by_num_ref})
        else:
            print_theory(promised, by_num_ref, out)
        if plot is not None:
            plot_theory(plot, transform, beta, num_ref)
            err.print(f"drawn: {plot}")


@app.command()
def serve(
    config: ConfigPath,
    cron: Cron = None,
    timezone: Timezone = "UTC",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0 opens it to everybody.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 4200,
    gpus: Gpus = 1,
    notify: Notify = None,
    overrides: Overrides = None,
    store: StoreUrl = "artifacts",
    debug: Debug = False,
) -> None:
    """Server, worker and schedule on this machine, in one command. Runs are started by the schedule, in the browser or by hand.

    Examples:

      qrpo serve config.yaml

      qrpo serve config.yaml --cron "0 3 * * *" --timezone Europe/Zurich
    """
    with _errors_as_lines(debug):
        from flows.serve import serve
        from tasks.config import load_config

        serve(
            load_config(config, overrides or ()),
            store,
            cron=cron,
            timezone=timezone,
            host=host,
            port=port,
            gpus=gpus,
            notify=notify,
            console=err,
        )


@app.command()
def deploy(
    config: ConfigPath,
    pool: Annotated[
        str, typer.Option("--pool", help="The work pool's name; it is made where missing.")
    ] = "qrpo",
    pool_type: Annotated[
        str, typer.Option("--type", help="Where runs happen: process, docker or kubernetes.")
    ] = "process",
    image: Annotated[
        str | None, typer.Option("--image", help="The image of docker and kubernetes jobs.")
    ] = None,
    cron: Cron = None,
    timezone: Timezone = "UTC",
    gpus: Gpus = 1,
    secrets: Annotated[
        list[str] | None,
        typer.Option(
            "--secret",
            metavar="VARIABLE=BLOCK",
            help="Environment variable that jobs take from a Secret block.",
        ),
    ] = None,
    notify: Notify = None,
    overrides: Overrides = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put the pipeline and every stage as deployments on the Prefect server that PREFECT_API_URL names.

    Examples:

      qrpo deploy config.yaml --store s3://bucket/qrpo --cron "0 3 * * *"

      qrpo deploy config.yaml --type kubernetes --image registry/qrpo:1 --store s3://bucket/qrpo
    """
    with _errors_as_lines(debug):
        from flows.deploy import DeployOptions, deploy, deployed_lines, pool_type_of
        from tasks.config import load_config

        pairs = [secret.partition("=") for secret in secrets or ()]
        if not all(variable and block for variable, _, block in pairs):
            raise typer.BadParameter(
                "--secret takes VARIABLE=BLOCK, such as AWS_SECRET_ACCESS_KEY=qrpo-s3-secret-key"
            )
        options = DeployOptions(
            pool=pool,
            pool_type=pool_type_of(pool_type),
            image=image,
            cron=cron,
            timezone=timezone,
            gpus=gpus,
            secrets={variable: block for variable, _, block in pairs},
            notify=notify,
        )
        deployed = deploy(load_config(config, overrides or ()), store, options)
        _show(deployed, "\n".join(deployed_lines(deployed)), as_json)


@app.command()
def evaluate(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="A run's name, or a configuration file.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME=PATH", help="Compare this model too: a folder or hub id."),
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            metavar="STEP",
            help="Compare the policy of this step of its training too; or `all`.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Fresh samples a prompt.")] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="A public suite instead: alpaca-eval or leetcode.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The suite's file: the baseline's outputs, or the problems."),
    ] = None,
    which: Annotated[
        str,
        typer.Option(
            "--which", help="The model for the suite: policy, reference, step-N, or one of --model."
        ),
    ] = "policy",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the suite's first rows.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer; by default the run's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="By default the run's.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            metavar="KEY=VALUE",
            help="alpaca-eval's judge: url, model, annotator, api_key, concurrency, options.NAME.",
        ),
    ] = None,
    difficulty: Annotated[
        Path | None,
        typer.Option("--difficulty", help="df_gamed.csv, for the leaderboard's length-controlled win rate."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where a suite's files go; by default SUITE-RUN-MODEL.")
    ] = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Policy, reference and other models on the held-out prompts, or one of them on a public suite.

    Several runs that differ in their seed are also taken as one. Examples:

      qrpo evaluate my-run

      qrpo evaluate my-run --checkpoint all

      qrpo evaluate my-run --model other=./another-policy

      qrpo evaluate seed-0 seed-1 seed-2

      qrpo evaluate my-run --suite alpaca-eval --data alpaca_eval_gpt4_baseline.json
      --judge url=http://localhost:8000/v1 --judge model=my-judge

      qrpo evaluate my-run --suite leetcode --data LeetCodeDataset-test.jsonl --samples 4
    """
    with _errors_as_lines(debug):
        from flows.evaluate import across_runs, named_models, print_comparison, run_config
        from storage import Store

        opened = Store(store)
        more = named_models(models or ())
        if suite is None:
            results = {}
            for name in names:
                results[name] = _evaluate_run(
                    run_config(opened, name, more, checkpoints or (), samples), store
                )
                if not as_json:
                    print_comparison(results[name], out)
            answer: dict[str, Any] = {"runs": results}
            if len(names) > 1:
                answer["together"] = across_runs(opened, names)
            if as_json:
                _print_json(answer)
            elif len(names) > 1:
                out.print("all runs together, 95% intervals over runs and prompts:")
                for score in ("reward", "quantile_reward", "win_rate", "kl", "length"):
                    value = answer["together"][score]
                    out.print(f"  {score}: {value['mean']:.4g} ({value['low']:.4g} to {value['high']:.4g})")
            return
        if len(names) != 1 or data is None:
            raise typer.BadParameter("--suite takes one run, and the suite's file with --data")
        from flows.suites import SUITES, judge_of, print_suite, request_of

        if suite not in SUITES:
            raise typer.BadParameter(f"no suite {suite!r}; there are {', '.join(SUITES)}")
        config = run_config(opened, names[0], more)
        request = request_of(
            opened,
            config,
            which,
            data,
            folder or Path(f"{suite}-{config.name}-{which}"),
            num_samples=samples,
            limit=limit,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        result = SUITES[suite](request, judge_of(judge or ()), difficulty)
        _print_json(result) if as_json else print_suite(result, out)


@app.command()
def report(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or a configuration file.")],
    path: Annotated[
        Path | None, typer.Option("--out", help="The page's file; by default report-RUN.html.")
    ] = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A run as one self-contained HTML page: result, plots, completions side by side, lineage."""
    with _errors_as_lines(debug):
        from flows.report import write_report
        from flows.show import run_name
        from storage import Store

        run = run_name(name)
        written = write_report(Store(store), run, path or Path(f"report-{run}.html"))
        _print_json(written) if as_json else out.print(
            f"{written['report']} ({written['bytes'] / 1024:.0f} KiB)"
        )


def main() -> None:
    """The console script's entry."""
    set_defaults(
        PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL", PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL="CRITICAL"
    )
    app()


def _run(
    config: Any,
    store: str,
    *,
    first: str = _STAGES[0],
    last: str = _STAGES[-1],
    force: tuple[str, ...] = (),
    as_json: bool,
) -> None:
    from flows.launch import launch, print_summary

    summary = launch(config, store, first=first, last=last, force=force, console=err)
    if as_json:
        _print_json(summary)
    else:
        print_summary(summary, out)


def _evaluate_run(config: Any, url: str) -> dict[str, Any]:
    """The summary of the run's evaluation, computed where it is not in the store yet."""
    from flows.launch import launch
    from qrpo.errors import DataError

    result = launch(config, url, first="evaluation", last="evaluation", console=err)
    if "evaluation" not in result:
        raise DataError(f"run {config.name} holds out no prompt, so there is nothing to evaluate it on")
    summary: dict[str, Any] = result["evaluation"]
    return summary


class _Lines(logging.Handler):
    """Log records as lines that are never folded, so that a path in one can be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), style="yellow" if record.levelno >= logging.WARNING else None)


@contextmanager
def _errors_as_lines(debug: bool) -> Iterator[None]:
    """One readable line for what a user can mend; a traceback only with --debug."""
    logger = logging.getLogger("qrpo")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    logger.handlers = [_Lines()]
    try:
        yield
    except (typer.Exit, typer.BadParameter, typer.Abort):
        raise
    except KeyboardInterrupt:
        err.print(
            "interrupted; the parts that were finished are kept, and the same command goes on from there",
        )
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            raise
        raise typer.Exit(_report(error)) from None


def _report(error: Exception) -> int:
    from qrpo.errors import ConfigError, QRPOError
    from storage import StoreError

    if isinstance(error, (QRPOError, StoreError)):
        err.print(f"error: {error}", style="red")
    else:
        err.print(
            f"error: {type(error).__name__}: {error} (run again with --debug for the traceback)",
            style="red",
        )
    return 2 if isinstance(error, ConfigError) else 1


def _check_stage(name: str | None) -> None:
    if name is not None and name not in _STAGES:
        raise typer.BadParameter(f"no stage {name!r}; the stages are {', '.join(_STAGES)}")


def _show(value: Any, table: Any, as_json: bool) -> None:
    if as_json:
        _print_json(value)
    else:
        out.print(table)


def _print_json(value: Any, dumps: Callable[..., str] = json.dumps) -> None:
    sys.stdout.write(dumps(value, ensure_ascii=False, default=str) + "\n")
