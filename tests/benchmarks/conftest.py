from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    """The benchmarks are scripts that import each other from their own directory."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
