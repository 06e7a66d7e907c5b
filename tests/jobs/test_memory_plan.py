"""Which way of reading is chosen, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamcollapse import Compute, RunSettings
from streamcollapse.run import memory_plan
from streamcollapse.run.memory_plan import choose_io
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.run.opened import open_job

LARGER = MemoryPlan(2, drop_after_use=True)


@pytest.mark.parametrize(
    ("cached", "rates", "chosen"),
    [
        (1.0, {"mmap": 1e9, "direct": 2e9}, "mmap"),
        (0.0, {"mmap": 1e9, "direct": 2e9}, "direct"),
        (0.0, {"mmap": 2e9, "direct": 1e9}, "mmap"),
        (0.0, {"mmap": 1e9, "direct": None}, "mmap"),
        (0.0, {"mmap": None, "direct": None}, "mmap"),
    ],
)
def test_auto_measures_what_does_not_fit(
    llama: Path, monkeypatch: pytest.MonkeyPatch, cached: float, rates: dict[str, Any], chosen: str
) -> None:
    job = open_job(llama, RunSettings(Compute("cpu")))
    monkeypatch.setattr(memory_plan, "_WORTH_PROBING", 0)
    monkeypatch.setattr(memory_plan, "cached_share", lambda checkpoint: cached)
    monkeypatch.setattr(memory_plan, "read_rate", lambda checkpoint, mode, num_bytes: rates[mode])
    assert choose_io(job, "auto", LARGER) == chosen
    assert choose_io(job, "auto", MemoryPlan(2, drop_after_use=False)) == "mmap", "what fits is not read twice"
    for io in ("mmap", "pread", "direct"):
        assert choose_io(job, io, LARGER) == io


def test_a_small_checkpoint_is_not_probed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory_plan, "read_rate", lambda *arguments: pytest.fail("the probe would take longer than it saves")
    )
    assert choose_io(open_job(llama, RunSettings(Compute("cpu"))), "auto", LARGER) == "mmap"
