"""`qrpo theory` as a person reads it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_theory"]


def print_theory(promised: dict[str, Any], by_num_ref: Sequence[dict[str, Any]], console: Console) -> None:
    """What the optimum promises, then how near a number of reference samples comes to it."""
    table = Table(
        "what",
        "value",
        title=f"the optimum for transform {promised['transform']}, beta {promised['beta']:g}",
        title_justify="left",
    )
    table.add_row("win rate against the reference = mean quantile reward", f"{promised['win_rate']:.4f}")
    table.add_row("KL(optimum || reference), nats a completion", f"{promised['kl']:.4g}")
    table.add_row("gain of the objective E[f(q)] - beta KL", f"{promised['gain']:.4g}")
    table.add_row("log Z", f"{promised['log_z']:.6g}")
    table.add_row("beta log Z", f"{promised['beta_log_z']:.6g}")
    enough = promised.get("enough_references")
    table.add_row(
        "reference samples for 95% of the gain", "more than tried" if enough is None else str(enough)
    )
    console.print(table)
    scaling = Table(
        "n",
        "win rate",
        "KL",
        "share of gain",
        "signal/noise",
        "noise of log ratio",
        "pairs told apart",
        "log Z, exact for n",
        title="with n reference samples a prompt, fitted noise and all",
        title_justify="left",
    )
    for row in by_num_ref:
        scaling.add_row(
            str(row["num_ref"]),
            f"{row['win_rate']:.4f}",
            f"{row['kl']:.4g}",
            f"{row['gain_share']:.1%}",
            f"{row['snr']:.3g}",
            f"{row['log_ratio_noise']:.3g}",
            f"{row['pairs_told_apart']:.1%}",
            f"{row['log_z_finite']:.6g}",
            style="bold" if row["num_ref"] == promised["num_ref"] else None,
        )
    console.print(scaling)
