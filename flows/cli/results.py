"""Commands about results: expected, measured, reported."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.app import AsJson, RunName, StoreUrl, Trust, command, err, out, print_json


@command()
def theory(
    beta: Annotated[float, typer.Option("--beta", min=0.0, help="Strength of the KL penalty.")] = 0.1,
    transform: Annotated[
        str, typer.Option("--transform", help="f, applied to the quantile reward.")
    ] = "identity",
    num_ref: Annotated[int, typer.Option("--num-ref", min=1, help="Reference samples per prompt.")] = 50,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also plot it into this file (png, svg, pdf).")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="Count this run's prompts whose reference rewards are all equal."),
    ] = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Compute the optimum for a transform and beta, before any GPU time is spent.

    Example: qrpo theory --beta 0.1 --transform identity --num-ref 50 --plot theory.png
    """
    from flows.views.theory import equal_rewards, print_theory
    from qrpo.method.theory import plot_theory, summary, theory_table
    from storage import Store

    promised, by_num_ref = summary(transform, beta, num_ref), theory_table(transform, beta)
    equal = equal_rewards(Store(store), run) if run is not None else {}
    if as_json:
        print_json({**promised, "by_num_ref": by_num_ref, **equal})
    else:
        print_theory(promised, by_num_ref, out)
        if equal:
            out.print(equal["note"])
    if plot is not None:
        plot_theory(plot, transform, beta, num_ref)
        err.print(f"drawn: {plot}")


@command()
def evaluate(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="A run's name, or a configuration file.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME=PATH", help="Also compare this model: a folder or hub id."),
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            metavar="STEP",
            help="Also compare the policy at this training step, or `all` saved steps.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="New samples per prompt.")] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="Evaluate on a public suite: alpaca-eval or leetcode.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="The suite's file: outputs of the baseline, or problems.")
    ] = None,
    which: Annotated[
        str,
        typer.Option(
            "--which", help="The model for the suite: policy, reference, step-N, or one of --model."
        ),
    ] = "policy",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first N rows of the suite.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Maximum tokens of an answer. Default: the run's."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Sampling temperature. Default: the run's.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            metavar="KEY=VALUE",
            help="Judge of alpaca-eval: url, model, annotator, api_key, concurrency, options.NAME.",
        ),
    ] = None,
    difficulty: Annotated[
        Path | None,
        typer.Option(
            "--difficulty", help="df_gamed.csv, for the length-controlled win rate of the leaderboard."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the suite's files. Default: SUITE-RUN-MODEL.")
    ] = None,
    trust: Trust = False,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Evaluate policy, reference and other models on the held-out prompts, or one model on a public suite.

    Runs that differ only in their seed are also summarized together. Examples:

      qrpo evaluate my-run

      qrpo evaluate my-run --checkpoint all

      qrpo evaluate my-run --model other=./another-policy

      qrpo evaluate seed-0 seed-1 seed-2

      qrpo evaluate my-run --suite alpaca-eval --data alpaca_eval_gpt4_baseline.json
      --judge url=http://localhost:8000/v1 --judge model=my-judge

      qrpo evaluate my-run --suite leetcode --data LeetCodeDataset-test.jsonl --samples 4
    """
    from flows.evaluate import is_file, named_models, require_trust, run_config
    from storage import Store

    opened, more = Store(store), named_models(models or ())
    if suite is None:
        configs = {name: run_config(opened, name, more, checkpoints or (), samples) for name in names}
        _evaluate_runs(configs, opened, as_json, trust)
        return
    if len(names) != 1 or data is None:
        raise typer.BadParameter("--suite takes one run, and the suite's file with --data")
    from flows.suites import SUITES, SuiteRequest, judge_of, print_suite

    if suite not in SUITES:
        raise typer.BadParameter(f"no suite {suite!r}; the suites are {', '.join(SUITES)}")
    config = run_config(opened, names[0], more)
    if not is_file(names[0]):
        require_trust(config.model_copy(update={"rewards": ()}), f"run {names[0]}", trust)
    request = SuiteRequest(
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
    print_json(result) if as_json else print_suite(result, out)


@command()
def report(
    name: RunName,
    path: Annotated[
        Path | None, typer.Option("--out", help="File of the page. Default: report-RUN.html.")
    ] = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Write a run as one self-contained HTML page: result, plots, completions side by side, lineage."""
    from flows.views.report import write_report
    from flows.views.runs import run_name
    from storage import Store

    run = run_name(name)
    written = write_report(Store(store), run, path or Path(f"report-{run}.html"))
    print_json(written) if as_json else out.print(f"{written['report']} ({written['bytes'] / 1024:.0f} KiB)")


def _evaluate_runs(configs: dict[str, Any], store: Any, as_json: bool, trust: bool) -> None:
    """Print the evaluation of each run, computed if the store does not have it, and of several runs together."""
    from flows.evaluate import across_runs, is_file, print_comparison, require_trust
    from flows.pipeline_run import run_pipeline
    from qrpo.errors import DataError
    from tasks.planner import planner_of

    answer: dict[str, Any] = {"runs": {}}
    for name, config in configs.items():
        if not is_file(name) and not planner_of(config, store.url, "evaluation").plan("evaluation").complete:
            require_trust(config, f"run {name}", trust)
        result = run_pipeline(config, store.url, first="evaluation", console=err)
        if "evaluation" not in result:
            raise DataError(
                f"run {config.name} has no held-out prompts to evaluate on; set prompts.eval_fraction"
            )
        answer["runs"][name] = result["evaluation"]
        if not as_json:
            print_comparison(result["evaluation"], out)
    if len(configs) > 1:
        answer["together"] = together = across_runs(store, list(configs))
        if not as_json:
            out.print("all runs together, 95% intervals over runs and prompts:")
            for score in ("reward", "quantile_reward", "win_rate", "kl", "length"):
                value = together[score]
                out.print(f"  {score}: {value['mean']:.4g} ({value['low']:.4g} to {value['high']:.4g})")
    if as_json:
        print_json(answer)
