"""Commands about results: expected, measured, reported."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from flows.cli.app import Answer, RunName, Trust, command

if TYPE_CHECKING:
    from storage import Store

log = logging.getLogger("qrpo")


@command()
def theory(
    store: "Store",
    beta: Annotated[float, Option(min=0.0, help="Strength of the KL penalty.")] = 0.1,
    transform: Annotated[str, Option(help="f, applied to the quantile reward.")] = "identity",
    num_ref: Annotated[int, Option(min=1, help="Reference samples per prompt.")] = 50,
    plot: Annotated[Path | None, Option(help="Also plot it into this file (png, svg, pdf).")] = None,
    run: Annotated[
        str | None, Option(help="Count this run's prompts whose reference rewards are all equal.")
    ] = None,
) -> Answer:
    """Compute the optimum for a transform and beta, before any GPU time is spent.

    Example: qrpo theory --beta 0.1 --transform identity --num-ref 50 --plot theory.png
    """
    from flows.views.results import equal_rewards, theory_view
    from qrpo.method.theory import plot_theory, summary, theory_table

    promised, by_num_ref = summary(transform, beta, num_ref), theory_table(transform, beta)
    equal = equal_rewards(store, run) if run is not None else {}
    if plot is not None:
        plot_theory(plot, transform, beta, num_ref)
        log.info("drawn: %s", plot)
    view = theory_view(promised, by_num_ref, equal.get("note"))
    return Answer({**promised, "by_num_ref": by_num_ref, **equal}, view)


@command()
def evaluate(
    names: Annotated[list[str], Argument(metavar="RUN...", help="A run's name, or a configuration file.")],
    store: "Store",
    models: Annotated[
        list[str] | None,
        Option("--model", metavar="NAME=PATH", help="Also compare this model: a folder or hub id."),
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        Option(
            "--checkpoint",
            metavar="STEP",
            help="Also compare the policy at this training step, or `all` saved steps.",
        ),
    ] = None,
    samples: Annotated[int | None, Option(min=1, help="New samples per prompt.")] = None,
    suite: Annotated[str | None, Option(help="Evaluate on a public suite: alpaca-eval or leetcode.")] = None,
    data: Annotated[
        Path | None, Option(help="The suite's file: outputs of the baseline, or problems.")
    ] = None,
    which: Annotated[
        str, Option(help="The model for the suite: policy, reference, step-N, or one of --model.")
    ] = "policy",
    limit: Annotated[int | None, Option(min=1, help="Only the first N rows of the suite.")] = None,
    max_tokens: Annotated[
        int | None, Option(min=1, help="Maximum tokens of an answer. Default: the run's.")
    ] = None,
    temperature: Annotated[
        float | None, Option(min=0.0, help="Sampling temperature. Default: the run's.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        Option(
            metavar="KEY=VALUE",
            help="Judge of alpaca-eval: url, model, annotator, api_key, concurrency, options.NAME.",
        ),
    ] = None,
    difficulty: Annotated[
        Path | None, Option(help="df_gamed.csv, for the length-controlled win rate of the leaderboard.")
    ] = None,
    folder: Annotated[
        Path | None, Option("--out", help="Folder for the suite's files. Default: SUITE-RUN-MODEL.")
    ] = None,
    trust: Trust = False,
) -> Answer:
    """Evaluate policy, reference and other models on the held-out prompts, or one model on a public
    suite.

    Runs that differ only in their seed are also summarized together. Examples:

      qrpo evaluate my-run

      qrpo evaluate my-run --checkpoint all

      qrpo evaluate my-run --model other=./another-policy

      qrpo evaluate seed-0 seed-1 seed-2

      qrpo evaluate my-run --suite alpaca-eval --data alpaca_eval_gpt4_baseline.json
      --judge url=http://localhost:8000/v1 --judge model=my-judge

      qrpo evaluate my-run --suite leetcode --data LeetCodeDataset-test.jsonl --samples 4
    """
    from flows.evaluate import evaluate_runs, is_file, named_models, require_trust, run_config

    more = named_models(models or ())
    if suite is None:
        configs = {name: run_config(store, name, more, checkpoints or (), samples) for name in names}
        return Answer(*evaluate_runs(configs, store, trust))
    if len(names) != 1 or data is None:
        raise typer.BadParameter("--suite takes one run, and the suite's file with --data")
    from flows.suites import SUITES, SuiteRequest, judge_of
    from flows.views.results import suite_table

    if suite not in SUITES:
        raise typer.BadParameter(f"no suite {suite!r}; the suites are {', '.join(SUITES)}")
    config = run_config(store, names[0], more)
    if not is_file(names[0]):
        require_trust(config.model_copy(update={"rewards": ()}), f"run {names[0]}", trust)
    sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    out = folder or Path(f"{suite}-{config.name}-{which}")
    request = SuiteRequest(store, config, which, data, out, samples, limit, sampling)
    result = SUITES[suite](request, judge_of(judge or ()), difficulty)
    return Answer(result, suite_table(result))


@command()
def report(
    name: RunName,
    store: "Store",
    path: Annotated[Path | None, Option("--out", help="File of the page. Default: report-RUN.html.")] = None,
) -> Answer:
    """Write a run as one self-contained HTML page: result, plots, completions side by side,
    lineage."""
    from flows.views.report import write_report
    from flows.views.runs import run_name

    run = run_name(name)
    written = write_report(store, run, path or Path(f"report-{run}.html"))
    return Answer(written, f"{written['report']} ({written['bytes'] / 1024:.0f} KiB)")
