"""Batches on a real local Ray: the same results as single runs, also where a worker is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from streamcollapse.cli.main import app
from tests.batches.conftest import write_jobs
from tests.batches.test_batch import GRID, assert_like_single_runs

ROOT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def test_without_ray_it_is_said_how_to_get_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, ["batch", str(write_jobs(base, [GRID])), "--engine", "ray"])
    assert result.exit_code == 1
    assert result.stderr == "error: --engine ray needs Ray: pip install 'streamcollapse[ray]'\n"
    assert not (base / "out").exists()


def on_ray(jobs: Path, task: str) -> Any:
    command = [sys.executable, "-m", "tests.batches.ray_run", str(jobs), task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_ray
def test_two_workers_of_which_one_is_killed(base: Path) -> None:
    broken: dict[str, object] = {"source": "models/broken", "verb": "convert"}
    found = on_ray(write_jobs(base, [GRID, broken]), "m0-C3-I1-T0.3")
    assert found["statuses"] == ["done", "done", "done", "done", "failed"]
    assert sorted(found["attempts"][:2]) == [1, 2], "killed at its first task, or just after it"
    assert found["attempts"][2:] == [1, 1, 1]
    assert found["pids"] == 3, "two workers, and one in place of the one that was killed"
    assert found["references"][0] == 16
    assert not any(found["references"][1:]), "what the killed worker found out serves the next one"
    assert_like_single_runs(base, base / "out")


@needs_ray
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ray-address", "127.0.0.1:9", "--device", "cpu"], "error: no Ray cluster at 127.0.0.1:9: "),
        (["--device", "cuda"], "error: the Ray cluster has no GPU; pass --device cpu"),
    ],
)
def test_what_a_cluster_cannot_do(base: Path, arguments: list[str], complaint: str) -> None:
    command = [sys.executable, "-m", "streamcollapse", "batch", str(write_jobs(base, [GRID])), "--engine", "ray"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith(complaint)
    assert done.stderr.count("\n") == 1
    assert not (base / "out").exists()
