import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_stage_killed_at_any_point_resumes_to_the_uninterrupted_result(tmp_path: Path):
    every = os.environ.get("QRPO_KILL_EVERY", "32")  # 1: the whole campaign, which takes hours
    command = [sys.executable, "-m", "tests.tasks.crash_stages", tmp_path, every]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=550 if every == "32" else None
    )

    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["faults"] == []
    assert result["killed"] == result["resumed"]
    assert result["unharmed"] < result["killed"] / 10
    assert all(
        result["points"][stage] >= 5 for stage in ("prompts", "completions", "rewards", "quantiles", "shards")
    )
