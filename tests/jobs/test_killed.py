"""A run that is killed at any moment leaves no half output, and the same command then ends as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import save_llama

ROOT = Path(__file__).parents[2]
POINTS = int(os.environ.get("STREAMCOLLAPSE_KILL_POINTS", "40"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("verb", "points", "phases"),
    [("prune", POINTS, ("start", "reference", "search", "write")), ("convert", POINTS // 4, ("start", "convert"))],
)
def test_killed_anywhere_it_ends_like_an_undisturbed_run(
    tmp_path: Path, verb: str, points: int, phases: tuple[str, ...]
) -> None:
    source = save_llama(tmp_path / "source", num_layers=6)
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "tests.jobs.killed", verb, str(source), str(tmp_path / "runs"), str(points), "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], done.stderr
    assert found["killed"] >= min(points, found["points"]) - 10
    assert min(found["phases"][phase] for phase in phases) >= 5
