"""Rows of gpu_day.py that time whole jobs: making a checkpoint, the paper's procedure, the default."""

from __future__ import annotations

import time

from gpu_bench import Bench
from gpu_devices import gigabytes
from gpu_rows import PAPER_SECONDS, Finding
from gpu_runs import described, fewer_layers, pruned, searched, seconds_of, telling
from make_checkpoint import disk_bytes, make_checkpoint

from streamcollapse.settings.run import RunSettings
from streamcollapse.settings.search import SearchOptions
from streamcollapse.units import format_bytes, format_seconds


def make(bench: Bench, shape: str, sparse: bool = False) -> Finding:
    """The checkpoint of ``shape``, made on the device."""
    start = time.perf_counter()
    weights = make_checkpoint(bench.source(shape), bench.shape(shape), sparse=sparse, device=bench.device.place)
    seconds = time.perf_counter() - start
    apparent, on_disk = disk_bytes(bench.source(shape))
    rate = "" if sparse else f" ({gigabytes(weights, seconds)})"
    return Finding(
        f"{format_bytes(weights)} in {format_seconds(seconds)}{rate}, {format_bytes(on_disk)} on the disk",
        {"weights": weights, "seconds": seconds, "apparent": apparent, "on_disk": on_disk},
    )


def laco(bench: Bench, shape: str, most_seconds: float | None = None) -> Finding:
    """The prune by ``laco`` with its defaults. ``fast``: its search takes less than ``most_seconds``."""
    done = pruned(bench, shape, SearchOptions(strategy="laco"), "sentences", bench.streaming())
    usage = done.report["usage"]
    search, both = seconds_of(usage, "search"), seconds_of(usage, "reference", "search")
    words = f"{described(done.plan, usage)}; reference and search {format_seconds(both)}"
    if shape == "llama2-7b":
        words += f" (the paper, on an A100: {PAPER_SECONDS} s for the whole pruning)"
    figures = {"search_seconds": search, "reference_and_search_seconds": both, "report": done.report}
    return Finding(words, figures, fast=None if most_seconds is None else search < most_seconds)


def default(bench: Bench, shape: str, ratio: float | None = None, fewer: int = 0) -> Finding:
    """The default strategy on its passages: the prune by ``ratio`` of the layers, or the search to ``fewer``."""
    if ratio is not None:
        done = pruned(
            bench, shape, SearchOptions(target_layers=f"{round(100 - 100 * ratio)}%"), None, bench.streaming()
        )
        return Finding(described(done.plan, done.report["usage"]), {"report": done.report})
    options = fewer_layers(bench.shape(shape), fewer, SearchOptions())
    settings = RunSettings(bench.compute(), bench.calibration(), bench.streaming())
    found = searched(bench.source(shape), options, settings, telling(bench))
    return Finding(described(found.plan, found.usage), {"usage": found.usage, "plan": found.plan.to_json()})
