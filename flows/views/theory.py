"""`qrpo theory` in a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.views.runs import RunArtifacts
from storage import Store

__all__ = ["equal_rewards", "print_theory"]


def equal_rewards(store: Store, run: str) -> dict[str, Any]:
    """The run's prompts whose reference rewards are all equal: the theory holds for those with ranks."""
    manifest = RunArtifacts(store, run).manifest("quantiles")
    known = {name: manifest.metadata.get(name) for name in ("equal_rewards", "num_excluded", "note")}
    if known["equal_rewards"] is None:
        note = "unknown: an earlier version made its quantiles. Run it again"
        return known | {"prompts": manifest.rows, "note": f"equal reference rewards: {note}"}
    none = f"no prompt of {manifest.rows:,} has reference rewards that are all equal"
    return known | {"prompts": manifest.rows, "note": known["note"] or none}


def print_theory(promised: dict[str, Any], by_num_ref: Sequence[dict[str, Any]], console: Console) -> None:
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
    console.print(table)
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
    console.print(scaling)
