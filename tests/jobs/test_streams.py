"""Which way of reading is chosen, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamcollapse import Compute
from streamcollapse.jobs import streams
from streamcollapse.progress import silent
from streamcollapse.run.memory_plan import choose_io
from streamcollapse.run.opened import open_job
from streamcollapse.stream.needs import Allotment

LARGER = Allotment(2, from_cache=True)


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
    job = open_job(llama, Compute("cpu"), False, silent)
    monkeypatch.setattr(streams, "_WORTH_PROBING", 0)
    monkeypatch.setattr(streams, "cached_share", lambda checkpoint: cached)
    monkeypatch.setattr(streams, "read_rate", lambda checkpoint, mode, num_bytes: rates[mode])
    assert choose_io(job, "auto", LARGER) == chosen
    assert choose_io(job, "auto", Allotment(2, from_cache=False)) == "mmap", "what fits is not read twice"
    for io in ("mmap", "pread", "direct"):
        assert choose_io(job, io, LARGER) == io


def test_a_small_checkpoint_is_not_probed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        streams, "read_rate", lambda *arguments: pytest.fail("the probe would take longer than it saves")
    )
    assert choose_io(open_job(llama, Compute("cpu"), False, silent), "auto", LARGER) == "mmap"
