"""LeetCodeDataset: the share of a problem's tests that a model's solution passes, and how often it
passes all.

Problems are the published JSON lines: `task_id`, `query` (the question to the model), `prompt`
(imports that precede a solution), `entry_point`, `test`. Solutions run in the sandbox of the code
reward.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qrpo.errors import DataError
from qrpo.evaluation.statistics import bootstrap_interval, mean_by_prompt, prompt_means
from qrpo.evaluation.suites.files import read_rows
from qrpo.rewards.code import CodeRewardConfig, run_tests


def read_problems(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The problems in the file's order, the first `limit` of them."""
    return read_rows(path, ("task_id", "query", "prompt", "entry_point", "test"))[:limit]


def score_solutions(
    problems: Sequence[Mapping[str, Any]],
    solutions: Mapping[str, Sequence[str]],
    *,
    reward: CodeRewardConfig | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score answers (texts with fenced code, by `task_id`); return a summary for JSON, and one row
    per solution.

    The summary has `tests_passed` (share of a solution's tests, mean over problems) and `pass_at_1`
    (share of solutions that pass all), each with `standard_error`, `low` and `high` over problems;
    `problems`, `samples`, `limits` and `packages`, and `unusable`: the reasons why problems could
    not be scored. Problems without an answer are ignored. Limits and packages are those of
    `reward`, by default the package that LeetCode offers, if it is installed.
    """
    rows = [
        {**problem, "solution": index, "text": text}
        for problem in problems
        for index, text in enumerate(solutions.get(problem["task_id"], ()))
    ]
    columns = {name: [row[name] for row in rows] for name in ("test", "entry_point", "prompt")}
    given = reward or CodeRewardConfig(packages=_offered_packages())
    config = CodeRewardConfig(
        preamble="prompt", limits=given.limits, packages=given.packages, workers=given.workers
    )
    verdicts = run_tests([row["text"] for row in rows], columns, config)
    unusable, scored = {}, []
    for row, verdict in zip(rows, verdicts, strict=True):
        if isinstance(verdict, DataError):
            unusable[row["task_id"]] = str(verdict)
            continue
        scored.append(
            {
                "task_id": row["task_id"],
                "solution": row["solution"],
                "tests_passed": verdict.share,
                "all_passed": verdict.all_passed,
                "note": verdict.note,
                "text": row["text"],
            }
        )
    if not scored:
        raise DataError(
            f"leetcode: no solution could be scored: {next(iter(unusable.values()), 'there is none')}"
        )
    problem = np.unique([row["task_id"] for row in scored], return_inverse=True)[1]
    summary: dict[str, Any] = {
        "problems": int(problem.max()) + 1,
        "samples": len(scored),
        "limits": config.limits.model_dump(),
        "packages": list(config.packages),
        "unusable": unusable,
    }
    for name, column in (("tests_passed", "tests_passed"), ("pass_at_1", "all_passed")):
        values = np.array([row[column] for row in scored], dtype=float)
        low, high = bootstrap_interval(prompt_means(values, problem), seed=seed)
        summary[name] = {**mean_by_prompt(values, problem), "low": low, "high": high}
    return summary, scored


def _offered_packages() -> tuple[str, ...]:
    return ("sortedcontainers",) if find_spec("sortedcontainers") else ()
