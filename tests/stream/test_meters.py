from __future__ import annotations

import mmap
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from streamcollapse.resources import meter as memory
from streamcollapse.resources.meter import MemorySample, Meter, Timeline, sample_memory


def test_bytes_and_memory_are_counted_per_phase() -> None:
    meter = Meter(torch.device("cpu"))
    with meter.phase("one"):
        meter.read("x", 10)
        meter.written(3)
        block = mmap.mmap(-1, 80_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(b"x" * len(block))  # 80 MB that the sampler has to see
        assert meter.bytes_read == 10
        block.close()
    with meter.phase("two"):
        meter.read("y", 5)
    one, two = meter.phases
    assert (one.name, one.bytes_read, one.bytes_written) == ("one", 10, 3)
    assert (two.bytes_read, two.bytes_written) == (5, 0)
    assert one.seconds > 0
    summary = meter.summary()
    assert (summary["bytes_read"], summary["bytes_written"]) == (15, 3)
    assert summary["seconds"] == one.seconds + two.seconds
    assert summary["peak_vram"] is None
    assert [p["name"] for p in summary["phases"]] == ["one", "two"]
    if one.peak_anonymous_rss is not None and two.peak_anonymous_rss is not None:
        assert one.peak_anonymous_rss - two.peak_anonymous_rss > 60_000_000
        assert summary["peak_anonymous_rss"] == one.peak_anonymous_rss


def test_a_phase_that_fails_is_measured_too() -> None:
    meter = Meter(torch.device("cpu"))
    with pytest.raises(ValueError, match="x"), meter.phase("broken"):
        raise ValueError("x")
    assert meter.phases[0].peak_rss > 0


def test_systems_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", Path("/nonexistent"))
    found = sample_memory()
    assert found.rss > 10_000_000
    assert found == MemorySample(found.rss)


def test_the_largest_of_each_figure_counts() -> None:
    assert MemorySample(5, 1, None, 7).most(MemorySample(3, 2, None, None)) == MemorySample(5, 2, None, 7)


def test_a_timeline_keeps_its_span_in_few_points() -> None:
    timeline = Timeline(most=16)
    for second in range(1000):
        timeline.add(float(second), MemorySample(second))
    seconds = [second for second, _ in timeline.points]
    assert 7 < len(seconds) <= 16
    assert seconds[0] < 130
    assert seconds[-1] > 870
    assert len({b - a for a, b in pairwise(seconds)}) == 1, "evenly spaced"
    assert all(sample.rss == second for second, sample in timeline.points)
