"""What needs no computing imports nothing that computes: help, versions, usage errors, mistakes in paths and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub")
CODE = f"""
import sys
from streamcollapse.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    print(sorted({{*{HEAVY}}} & set(sys.modules)), end.code)
"""


def _imports(*arguments: str) -> str:
    """Which heavy modules a call imports, and its exit code."""
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["prune", "--help"], 0),
        (["strategies"], 0),
        (["prune", "SOURCE", "--out", "new", "--stratgy", "laco"], 2),
        (["prune", "SOURCE"], 2),
        (["prune", "SOURCE", "--out", "new", "-C", "1"], 1),
        (["prune", "nowhere", "--out", "new"], 1),
        (["prune", "SOURCE", "--out", "there"], 1),
        (["search", "SOURCE", "--plan", "there"], 1),
        (["apply", "nowhere", "plan.json", "--out", "new"], 1),
        (["convert", "nowhere", "--out", "new"], 1),
        (["inspect", "nowhere"], 1),
        (["perplexity", "nowhere", "--text", "text.txt"], 1),
        (["similarity", "nowhere", "--out", "new"], 1),
        (["bench", "nowhere"], 1),
        (["speed", "SOURCE", "--against", "nowhere"], 1),
        (["batch", "jobs.yaml"], 1),
        (["batch", "nowhere.yaml"], 1),
    ],
)
def test_nothing_heavy_is_imported(llama: Path, tmp_path: Path, arguments: list[str], code: int) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "jobs.yaml").write_text(f"jobs: [{{source: {llama}, treshold: 1}}]")
    names = {name: str(tmp_path / name) for name in ("there", "new", "nowhere", "jobs.yaml", "nowhere.yaml")}
    given = [str(llama) if one == "SOURCE" else names.get(one, one) for one in arguments]
    assert _imports(*given) == f"[] {code}"


def test_inspect_imports_no_model_code(llama: Path) -> None:
    assert "'torch'" in _imports("inspect", str(llama))
    assert "transformers" not in _imports("inspect", str(llama))
