"""Commands that run stages, or preview a run."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from flows.cli.app import Answer, ConfigPath, Overrides, command, out, stage_option
from tasks.stages import STAGE_NAMES

if TYPE_CHECKING:
    from storage import Store


@command()
def demo(store: "Store") -> Answer:
    """Run the whole pipeline on this machine in minutes, with a small model and task. Downloads
    nothing.

    Example: qrpo demo, then qrpo inspect demo rewards
    """
    from tasks.config import load_config

    folder, example = Path("demo"), Path(__file__).parents[2] / "examples" / "demo"
    if not (folder / "base" / "config.json").is_file():
        from examples.demo.task import write_demo  # imports torch, to build a model

        write_demo(folder)
    for name in ("config.yaml", "reward.py"):
        if not (folder / name).exists():  # an edited demo runs as edited
            shutil.copy(example / name, folder / name)
    return _run(load_config(folder / "config.yaml"), store)


@command(shared=("as_json", "debug"))
def init(
    config: Annotated[Path, Argument(metavar="CONFIG", help="A new YAML file.")],
    prompts: Annotated[str, Option(help="File, folder or hf:// dataset of prompts.")],
    model: Annotated[str, Option(help="The reference policy: a folder or a hub id.")],
    reward: Annotated[str, Option(help="The reward: FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.")],
    overrides: Overrides = None,
) -> Answer:
    """Write a configuration with every setting, its default and what it means.

    Example: qrpo init config.yaml --prompts prompts.jsonl --model org/name --reward
    reward.py:reward
    """
    from qrpo.errors import ConfigError
    from tasks.config import apply_overrides, dump_config, parse_config

    if config.exists():
        raise ConfigError(f"{config} exists: name another file, or remove it")
    raw = {
        "name": config.stem,
        "prompts": {"source": prompts, "eval_fraction": 0.05},
        "reference": {"model": {"path": model}},
        "rewards": [{"kind": "function", "function": reward}],
    }
    text = dump_config(parse_config(apply_overrides(raw, overrides or ()), where="qrpo init"))
    config.write_text(text, encoding="utf-8")
    return Answer(
        {"config": str(config)}, f"{config}: edit it, then `qrpo plan {config}` and `qrpo run {config}`"
    )


@command()
def run(
    config: ConfigPath,
    store: "Store",
    first: Annotated[
        str | None, stage_option("--from", "Start with this stage; earlier stages must be complete.")
    ] = None,
    last: Annotated[str | None, stage_option("--until", "Stop after this stage.")] = None,
    only: Annotated[
        str | None, stage_option("--only", f"Run this stage alone: {', '.join(STAGE_NAMES)}.")
    ] = None,
    overrides: Overrides = None,
    force: Annotated[
        list[str] | None, stage_option("--force", "Compute this stage again even if it is cached.")
    ] = None,
    show_config: Annotated[
        bool, Option("--show-config", help="Print the whole configuration and stop.")
    ] = False,
) -> Answer | None:
    """Run the stages of CONFIG. What the store already has is not computed again.

    Examples:

      qrpo run config.yaml

      qrpo run config.yaml --until rewards --set completions.num_ref=50

      qrpo run config.yaml --only policy --set policy.beta=0.05
    """
    from tasks.config import dump_config, load_config

    loaded = load_config(config, overrides or ())
    if show_config:
        out.print(dump_config(loaded), end="")
        return None
    if only is not None and (first is not None or last is not None):
        raise typer.BadParameter("--only STAGE stands alone: it means --from STAGE --until STAGE")
    first, last = only or first or STAGE_NAMES[0], only or last or STAGE_NAMES[-1]
    if STAGE_NAMES.index(first) > STAGE_NAMES.index(last):
        raise typer.BadParameter(f"--from {first} comes after --until {last}, so no stage is left to run")
    return _run(loaded, store, first=first, last=last, force=tuple(force or ()))


@command()
def compare(
    config: ConfigPath,
    store: "Store",
    overrides: Overrides = None,
    write: Annotated[Path | None, Option("--out", help="Also write the report into this JSON file.")] = None,
) -> Answer:
    """Train every method of the section `compare` over its grid and seeds, and report the best of
    each method.

    All methods share their samples, rewards and held-out prompts. Policies that the store already
    has are not trained again.

    Example: qrpo compare examples/reproduce/config.yaml --out comparison.json
    """
    from flows.pipeline_run import run_flow
    from flows.views.results import comparison_table
    from tasks.config import load_config

    report = run_flow("flows.compare", "compare", load_config(config, overrides or ()), store)
    if write is not None:
        write.write_text(json.dumps(report, indent=1) + "\n")
    return Answer(report, comparison_table(report))


@command()
def plan(config: ConfigPath, store: "Store", overrides: Overrides = None) -> Answer:
    """Show what `qrpo run` would compute, what is cached, why, and what would stop it. Writes
    nothing.

    Calls the rewards on a row of the dataset. Exit code 1 if anything would stop the run.

    Examples:

      qrpo plan config.yaml

      qrpo plan config.yaml --set completions.num_ref=50 --json
    """
    from flows.views.plan import plan_view, preview
    from qrpo.errors import QRPOError
    from tasks.config import load_config
    from tasks.planner import Planner
    from tasks.preflight import preflight, raise_all

    loaded = load_config(config, overrides or ())
    problems = preflight(Planner(loaded, store), STAGE_NAMES)
    try:
        planned = preview(loaded, store)
    except QRPOError:
        raise_all(problems)
        raise
    planned["problems"] = [str(problem) for problem in problems]
    return Answer(planned, plan_view(planned), failed=bool(problems))


def _run(config: Any, store: "Store", **span: Any) -> Answer:
    from flows.pipeline_run import run_pipeline, summary_view

    summary = run_pipeline(config, store, **span)
    return Answer(summary, summary_view(summary))
