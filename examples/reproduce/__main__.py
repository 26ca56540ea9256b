"""`python -m examples.reproduce`: create the task, compare the methods, write tables and plots.

    python -m examples.reproduce [--store artifacts] [--out docs]
    python -m examples.reproduce --report docs/reproduction.json  # only text and plots

Writes `reproduction.json` (the report of `qrpo compare`), `reproduction.md` (findings on the
paper's claims, and tables) and `reproduction.svg` into the folder `--out`. After a kill the same
command resumes; a second run is fully cached.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

from examples.reproduce.task import write_task
from qrpo.method.theory import summary
from tasks.config import load_config

matplotlib.use("Agg")
CONFIG = Path(__file__).with_name("config.yaml")
MAIN = ("qrpo", "qrpo-log", "dpo", "rebel", "simpo")
OFFLINE = ("qrpo-offline", "dpo-offline", "simpo-offline")
NUM_REF = (1, 3, 10, 50)
BETAS = {"small": 0.1, "large": 0.3}


def findings(report: dict[str, Any]) -> str:
    """The report's findings on the paper's claims; the wording follows the numbers."""
    methods, reference = report["methods"], report["reference"]
    lines = [f"- **Reward at each method's best setting.** {_leads(report)}"]
    for name, beta in BETAS.items():
        few, many = (methods[f"n{n}-{name}-beta"]["scores"]["reward"] for n in (1, 50))
        apart = few["high"] < many["low"] or many["high"] < few["low"]
        gain = many["mean"] - few["mean"]
        below = (
            f" Both are below the reference ({_reference_prompts(report)})."
            if max(few["mean"], many["mean"]) < reference["reward"]
            else ""
        )
        lines.append(
            f"- **More reference samples, beta {beta}.** From n = 1 to 50 reward changes by {gain:+.3f}, from {_shown(few)} to "
            f"{_shown(many)}: the intervals {'do not overlap' if apart else 'overlap'}.{below}"
        )
    over = {name: methods[name]["scores"]["length"]["mean"] - reference["length"] for name in OFFLINE}
    shown = ", ".join(f"{name} {value:+.2f}" for name, value in over.items())
    lines.append(
        f"- **The dataset's pairs.** Tokens above the reference ({reference['length']:.2f} {_reference_prompts(report)}): {shown}. "
        "This does not compare the methods' length bias: `qrpo-offline` trains on rewards that do not depend on length, the "
        "others on the choices of a judge that likes length."
    )
    for name in ("qrpo", "qrpo-log"):
        settings, scores = methods[name]["settings"], methods[name]["scores"]
        promised = summary(settings.get("policy.transform", "identity"), settings["policy.beta"], 50)
        lines.append(
            f"- **The optimum, `{name}` at beta {settings['policy.beta']}.** Predicted: win rate {promised['win_rate']:.3f} for "
            f"{promised['kl']:.2f} nats. Measured: {scores['win_rate']['mean']:.3f} (quantile reward "
            f"{scores['quantile_reward']['mean']:.3f}) for {scores['kl']['mean']:.2f}."
        )
    return "\n".join(lines) + "\n"


def _reference_prompts(report: dict[str, Any]) -> str:
    """The prompts of the reference's scores. Reports of version 0.1.0 do not say: all that are held
    out."""
    return "over the same prompts" if "reference_prompts" in report else "over all held-out prompts"


def _leads(report: dict[str, Any]) -> str:
    methods, reference = report["methods"], report["reference"]["reward"]
    told = []
    for name in MAIN[1:]:
        behind = methods[name]["behind"]
        verdict = "behind" if behind["low"] > 0 else "ahead" if behind["high"] < 0 else "not distinguishable"
        told.append(
            f"`{name}` is {verdict} ({-behind['mean']:+.3f}, {-behind['high']:+.3f} to {-behind['low']:+.3f})"
        )
    said = (
        f"`qrpo` has {_shown(methods['qrpo']['scores']['reward'])}. Relative to it, " + "; ".join(told) + "."
    )
    if lost := [name for name in MAIN if methods[name]["scores"]["reward"]["mean"] < reference]:
        names = ", ".join(f"`{name}`" for name in lost)
        said += (
            f" The best setting in the grid of {names} does not reach the reference ({_reference_prompts(report)}): "
            "the grid may be the reason."
        )
    return said


def tables(report: dict[str, Any]) -> str:
    """The report as three Markdown tables."""
    reference = report["reference"]
    judged = (
        f"{report['seeds']} seeds, {report['prompts']} held-out prompts that were not used to choose settings"
    )
    lines = [
        f"{judged}; mean and nominal 95% interval over seeds and prompts.",
        "With 3 seeds such intervals cover 77 to 89%.",
        f"The row `reference` is {_reference_prompts(report)}.",
        "",
        "| method | best settings | reward | win rate | quantile reward | KL | tokens | behind `qrpo` |",
        "|---|---|---|---|---|---|---|---|",
        _reference_row(reference),
        *(_row(name, report["methods"][name]) for name in MAIN),
        "",
        "| n | "
        + " | ".join(f"beta {beta}: reward | win rate | quantile reward" for beta in BETAS.values())
        + " |",
        "|---|---|---|---|---|---|---|",
    ]
    for n in NUM_REF:
        cells = [
            _shown(report["methods"][f"n{n}-{beta}-beta"]["scores"][score])
            for beta in BETAS
            for score in ("reward", "win_rate", "quantile_reward")
        ]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    lines += [
        "",
        "| method, dataset's pairs | best settings | reward | tokens | tokens above the reference |",
        "|---|---|---|---|---|",
    ]
    for name in OFFLINE:
        entry = report["methods"][name]
        length = entry["scores"]["length"]
        over = length["mean"] - reference["length"]
        lines.append(
            f"| {name} | {_settings(entry)} | {_shown(entry['scores']['reward'])} | {_shown(length)} | {over:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Win rate over KL with the optimum's frontier, and reward over the number of reference
    samples."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    frontier = [summary("identity", beta, 50) for beta in (0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0)]
    left.plot([one["kl"] for one in frontier], [one["win_rate"] for one in frontier], "k--", label="optimum")
    for name in MAIN:
        scores = report["methods"][name]["scores"]
        left.errorbar(
            scores["kl"]["mean"], scores["win_rate"]["mean"], label=name, fmt="o", **_errors(scores)
        )
    left.set(xlabel="KL to the reference, nats", ylabel="win rate against the reference")
    left.legend()
    for beta, value in BETAS.items():
        rewards = [report["methods"][f"n{n}-{beta}-beta"]["scores"]["reward"] for n in NUM_REF]
        low = [one["mean"] - one["low"] for one in rewards]
        high = [one["high"] - one["mean"] for one in rewards]
        right.errorbar(
            NUM_REF, [one["mean"] for one in rewards], yerr=[low, high], label=f"beta {value}", marker="o"
        )
    right.axhline(
        report["reference"]["reward"],
        color="grey",
        linestyle=":",
        label=f"reference, {_reference_prompts(report)}",
    )
    right.set(
        xscale="log",
        xlabel="reference samples per prompt",
        ylabel="reward",
        xticks=NUM_REF,
        xticklabels=NUM_REF,
    )
    right.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _errors(scores: dict[str, dict[str, float]]) -> dict[str, list[list[float]]]:
    errors = {}
    for axis, name in (("xerr", "kl"), ("yerr", "win_rate")):
        one = scores[name]
        errors[axis] = [[one["mean"] - one["low"]], [one["high"] - one["mean"]]]
    return errors


def _reference_row(scores: dict[str, float]) -> str:
    reward, quantile_reward, length = scores["reward"], scores["quantile_reward"], scores["length"]
    return f"| reference | | {reward:.3f} | 0.5 | {quantile_reward:.3f} | 0 | {length:.2f} | |"


def _row(name: str, entry: dict[str, Any]) -> str:
    scores = entry["scores"]
    shown = [_shown(scores[key]) for key in ("reward", "win_rate", "quantile_reward", "kl", "length")]
    behind = _shown(entry["behind"]) if "behind" in entry else ""
    return f"| {name} | {_settings(entry)} | {' | '.join(shown)} | {behind} |"


def _settings(entry: dict[str, Any]) -> str:
    words = {"policy.beta": "beta", "policy.learning_rate": "lr", "policy.transform": ""}
    return ", ".join(
        f"{words[key]} {value}".strip() for key, value in entry["settings"].items() if key in words
    )


def _shown(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def main() -> None:
    """Run the comparison, or find it in the store, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--report", type=Path, help="an existing report")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text()) if arguments.report else measure(arguments.store)
    said = f"{findings(report)}\n{tables(report)}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "reproduction.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "reproduction.md").write_text(said)
    plot(report, arguments.out / "reproduction.svg")
    print(said, end="")


def measure(store: str) -> dict[str, Any]:
    """The report of the comparison, computed or found in the store."""
    folder = Path("reproduce")
    if not (folder / "base" / "config.json").is_file():
        write_task(folder)
    from flows.service.server import start_server

    server_answers = start_server()
    from flows.compare import compare

    server_answers()
    report: dict[str, Any] = compare(load_config(CONFIG), store)
    return report


if __name__ == "__main__":
    main()
