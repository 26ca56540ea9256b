"""What `qrpo theory`, `run`, `evaluate` and `compare` found, in a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Column, Table

from flows.views.runs import RunArtifacts
from qrpo.evaluation.summary import Score
from storage import Store
from tasks.artifact_summary import MAIN_MEASURES, compare_models, interval

SCORES: tuple[Score, ...] = ("reward", "win_rate", "quantile_reward", "kl", "length")


def equal_rewards(store: Store, run: str) -> dict[str, Any]:
    """The run's prompts whose reference rewards are all equal: the theory holds for those with
    ranks."""
    manifest = RunArtifacts(store, run).manifest("quantiles")
    known = {name: manifest.metadata.get(name) for name in ("equal_rewards", "num_excluded", "note")}
    note = known["note"] or f"no prompt of {manifest.rows:,} has reference rewards that are all equal"
    if known["equal_rewards"] is None:
        note = "equal reference rewards: unknown: an earlier version made its quantiles. Run it again"
    return known | {"prompts": manifest.rows, "note": note}


def theory_view(promised: dict[str, Any], by_num_ref: Sequence[dict[str, Any]], note: str | None) -> Group:
    """What the optimum promises, then how near a number of reference samples gets to it."""
    title = f"the optimum for transform {promised['transform']}, beta {promised['beta']:g}"
    table = Table("what", "value", title=title, title_justify="left")
    enough = promised.get("enough_references")
    for what, value in {
        "win rate against the reference = mean quantile reward": f"{promised['win_rate']:.4f}",
        "KL(optimum || reference), nats per completion": f"{promised['kl']:.4g}",
        "gain of the objective E[f(q)] - beta KL": f"{promised['gain']:.4g}",
        "log Z": f"{promised['log_z']:.6g}",
        "beta log Z": f"{promised['beta_log_z']:.6g}",
        "reference samples for 95% of the gain": "more than tried" if enough is None else str(enough),
    }.items():
        table.add_row(what, value)
    columns = {
        "n": ("num_ref", "d"),
        "win rate": ("win_rate", ".4f"),
        "KL": ("kl", ".4g"),
        "share of gain": ("gain_share", ".1%"),
        "signal/noise": ("snr", ".3g"),
        "noise of log ratio": ("log_ratio_noise", ".3g"),
        "distinct pairs": ("pairs_told_apart", ".1%"),
        "log Z, exact for n": ("log_z_finite", ".6g"),
    }
    title = "with n reference samples per prompt, fitted noise included"
    scaling = Table(*columns, title=title, title_justify="left")
    for row in by_num_ref:
        style = "bold" if row["num_ref"] == promised["num_ref"] else None
        scaling.add_row(*(format(row[key], form) for key, form in columns.values()), style=style)
    return Group(table, scaling, *([note] if note else []))


def evaluation_table(summary: Mapping[str, Any], *, brief: bool = False) -> Table:
    """The comparison of a run's models; `brief`: its main lines."""
    names, rows = compare_models(summary)
    samples = summary["policy"]["samples"]
    title = f"{summary['prompts']} held-out prompts, {samples:,} fresh samples of each model"
    table = Table(Column("", no_wrap=True), *names, title=title, title_justify="left")
    for heading, cells in rows.items():
        if heading in MAIN_MEASURES or not brief:
            table.add_row(heading, *map(str, cells))
    return table


def evaluation_view(summary: Mapping[str, Any]) -> Iterator[Any]:
    """The comparison, how far its draws differ, and which model is the best."""
    yield evaluation_table(summary)
    draws = np.array(summary["policy"]["reward_by_draw"])
    if len(draws) > 1:
        spread = f"{draws.min():.4f} to {draws.max():.4f} over {len(draws)}"
        yield f"mean reward of the policy by draw: {spread}"
    if best := summary.get("best"):
        chosen = f"best by reward on {best['selection_prompts']} prompts: {best['best']}"
        yield f"{chosen}; on the {best['report_prompts']} others {interval(best['reported'])}"


def across_runs_lines(together: Mapping[str, Any]) -> Iterator[str]:
    """The scores of several runs as one."""
    yield "all runs together, 95% intervals over runs and prompts:"
    for score in SCORES:
        value = together[score]
        yield f"  {score}: {value['mean']:.4g} ({value['low']:.4g} to {value['high']:.4g})"


def comparison_table(report: dict[str, Any]) -> Table:
    """The report of `qrpo compare`, one row per method."""
    select_by = report["select_by"].replace("_", " ")
    title = (
        f"{report['run']}: each method's best by {select_by} on half of the held-out prompts, reported on the other "
        f"{report['prompts']}; {report['seeds']} seeds, 95% intervals"
    )
    scores = [name.replace("_", " ") for name in SCORES]
    table = Table("method", *scores, "behind the first", "settings", title=title)
    reference = report["reference"]
    own = [f"{reference[name]:.3f}" if name in reference else "" for name in SCORES]
    table.add_row("reference", *own, "", "")
    for method, entry in report["methods"].items():
        cells = [str(interval(entry["scores"][name])) for name in SCORES]
        behind = str(interval(entry["behind"])) if "behind" in entry else ""
        settings = [
            f"{key.removeprefix('policy.')} {value}"
            for key, value in entry["settings"].items()
            if key != "policy.loss"
        ]
        table.add_row(method, *cells, behind, ", ".join(settings))
    return table


def suite_table(result: Mapping[str, Any]) -> Table:
    """A public suite's result."""
    if result["suite"] == "alpaca-eval":
        controlled = "unknown"
        if result["length_controlled_win_rate"] is not None:
            error = result["length_controlled_standard_error"]
            controlled = f"{result['length_controlled_win_rate']:.2f}% ± {error:.2f}"
        rows = {
            "win rate": f"{result['win_rate']:.2f}% ± {result['standard_error']:.2f}",
            "length-controlled win rate": f"{controlled} ({result['length_control']})",
            "judged": f"{result['judged']}, and {result['unreadable']} unreadable",
            "characters per answer": f"{result['mean_length']:.0f}, the baseline {result['baseline_length']:.0f}",
        }
    else:
        rows = {
            "tests passed": str(interval(result["tests_passed"])),
            "pass@1": str(interval(result["pass_at_1"])),
            "problems": f"{result['problems']}, {result['samples']} solutions",
        }
        if result["unusable"]:
            rows["unusable problems"] = str(len(result["unusable"]))
    if result["refused"]:
        rows["prompts that could not be asked"] = str(len(result["refused"]))
    title = f"{result['suite']}: {result['model']} of run {result['run']}"
    table = Table("", "value", title=title, title_justify="left")
    for row in (rows | {"files": result["folder"]}).items():
        table.add_row(*row)
    return table
