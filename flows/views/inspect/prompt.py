"""One prompt through every stage: the conversation, its completions by reward, and how training
used each."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from flows.views.inspect.lookup import PromptLookup

_QUANTILE = ("quantile_reward", "quantile_low", "quantile_high")


def follow_prompt(run: PromptLookup, beginning: str) -> dict[str, Any]:
    """Everything that a run has of one prompt; its id may be shortened to a unique beginning.

    `stages` are the rows as stored. `completions` joins them, best reward first. Each has `rank`
    (the share of reference rewards at or below its own), the quantile reward if the `quantiles`
    stage computed one, and `became`: its place in the shards, or why it has none. `samples` are
    those of the evaluation in the same form.
    """
    prompt_id, sources = run.find_prompt(beginning)
    found = {stage: run.find(stage, [prompt_id], sources) for stage in run.manifests}
    reached = {stage: rows for stage, rows in found.items() if rows or run.manifests[stage].rows}
    stages = {stage: [row for _, _, row in rows] for stage, rows in reached.items()}
    quantiles = next(iter(stages.get("quantiles", ())), None)
    ref_rewards = sorted(quantiles["ref_rewards"]) if quantiles else []
    rejects = run.rejects(prompt_id, sources)
    rewards = {_key(row): row for row in stages.get("rewards", ())}
    judged = _by_completion(quantiles, _QUANTILE)
    trained: dict[Any, dict[str, Any]] = {}
    for part, number, row in found.get("shards", ()):
        place = {"became": f"shard {part.fingerprint[:12]}, row {number}"}
        trained |= {key: values | place for key, values in _by_completion(row, ("ref_logprob",)).items()}
    rejected = {row["key"]: f"rejected by {row['stage']}: {row['reason']}" for row in rejects}
    completions = []
    for row in stages.get("completions", ()):
        key = _key(row)
        name = f"{prompt_id}/{row['origin']}/{row['sample_index']}"
        became = rejected.get(name) or ("not trained on" if found.get("shards") else "")
        completions.append(
            {name: value for name, value in row.items() if name != "prompt_id"}
            | {name: rewards.get(key, {}).get(name) for name in ("reward", "components", "error")}
            | {"ref_logprob": None, "became": became}
            | judged.get(key, dict.fromkeys(_QUANTILE))
            | trained.get(key, {})
        )
    samples = [
        row | {"origin": row["model"], "components": None, "error": None, "became": ""}
        for row in stages.get("evaluation", ())
    ]
    for rows in (completions, samples):
        for row in rows:
            known = row["reward"] is not None and ref_rewards
            row["rank"] = bisect_right(ref_rewards, row["reward"]) / len(ref_rewards) if known else None
        rows.sort(key=_by_reward)
    return {
        "run": run.run,
        "prompt_id": prompt_id,
        "prompt": next(iter(stages.get("prompts", ())), None),
        "completions": completions,
        "samples": samples,
        "ref_rewards": ref_rewards,
        "rejects": rejects,
        "stages": stages,
    }


def _by_completion(row: Mapping[str, Any] | None, columns: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """The list columns of a row that holds many completions, by completion."""
    keys = list(zip(row["origin"], row["sample_index"], strict=True)) if row else []
    return {key: {name: row[name][place] for name in columns} for place, key in enumerate(keys) if row}


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["origin"], row["sample_index"]


def _by_reward(row: Mapping[str, Any]) -> tuple[float, str, int]:
    """Best first, those without a reward last."""
    reward = row["reward"]
    missing = reward is None or reward != reward
    return (float("inf") if missing else -float(reward)), row["origin"], row["sample_index"]
