import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_stage_killed_at_any_point_resumes_to_the_uninterrupted_result(tmp_path: Path):
    script = Path(__file__).with_name("crash_stages.py")

    done = subprocess.run(
        [sys.executable, script, tmp_path, "16"], capture_output=True, text=True, timeout=550
    )

    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["faults"] == []
    assert result["killed"] == result["resumed"]
    assert all(
        result["points"][stage] >= 5 for stage in ("prompts", "completions", "rewards", "quantiles", "shards")
    )
