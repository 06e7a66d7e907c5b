"""Rows of gpu_day.py on models that do not fit: passes with nothing resident, budgets, a GPU that others use too.

Sparse checkpoints have holes in the place of large matrices, which read as zeros: what is measured is the page cache
and the bus, never a disk.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from gpu_bench import Bench
from gpu_bus import ROUNDS, Layers, read_alone
from gpu_devices import gigabytes, timed
from gpu_rows import OF_CEILING, Finding
from gpu_runs import (
    Likeness,
    Peaks,
    compared,
    described,
    described_peaks,
    fewer_layers,
    peaks,
    pruned,
    recorded,
    searched,
    telling,
    within_limits,
)

from streamcollapse.errors import BudgetError
from streamcollapse.forward.reference import reference_pass
from streamcollapse.jobs import prepare
from streamcollapse.merge.plan import Plan
from streamcollapse.resources.meter import MemorySample
from streamcollapse.run.memory_plan import plan_memory
from streamcollapse.run.needs import Demand
from streamcollapse.run.opened import open_job, open_run
from streamcollapse.run.samples import calibration_samples
from streamcollapse.settings.run import RunSettings, Streaming
from streamcollapse.settings.search import SearchOptions
from streamcollapse.units import format_bytes

LACO = SearchOptions(strategy="laco")
_HOLD = """
import sys, torch
device, left = sys.argv[1], int(sys.argv[2])
if device == "cuda":
    torch.zeros(1, device=device)
    held = torch.empty(max(torch.cuda.mem_get_info()[0] - left, 1), dtype=torch.uint8, device=device)
else:
    held = torch.ones(1 << 24, dtype=torch.uint8)
print(held.numel(), flush=True)
sys.stdin.read()
"""


def streamed_pass(bench: Bench, shape: str, vram: int) -> Finding:
    """Reference passes on ten sentences that read every layer, from the page cache."""
    device = bench.device
    before = bench.before()
    job = open_job(bench.source(shape), RunSettings(bench.compute()))
    layers, samples = Layers.of(job), calibration_samples(job, bench.calibration("sentences"), "sentences")
    reading, copying = read_alone(layers, device), device.copies().rate(bench.pick(1 << 30, 1 << 22))
    device.page_out()
    choice = plan_memory(job, samples, bench.streaming(vram, io="pread"), Demand(job.num_layers))
    with open_run(job, replace(choice, resident_layers=0), bench.place) as given, job.meter.phase("passes"):
        model = given.model

        def once() -> None:
            reference_pass(model, samples.batches, range(0))
            device.synchronize()

        first, seconds = timed(once), [timed(once) for _ in range(ROUNDS)]
    rate, ceiling = layers.num_bytes / median(seconds), min(layers.num_bytes / reading, copying)
    found = peaks(job.meter.summary(), before)
    words = (
        f"{rate / ceiling:.2f}: {format_bytes(layers.num_bytes)} at {gigabytes(rate, 1)} (first {first:.2f} s, then "
    )
    words += f"{median(seconds):.2f} s); reading alone {gigabytes(layers.num_bytes, reading)}, copying alone "
    words += f"{gigabytes(copying, 1)}; {described_peaks(found)}"
    figures = {"first": first, "seconds": seconds, "bytes": layers.num_bytes, "share": rate / ceiling, "peaks": found}
    figures |= {"reading": layers.num_bytes / reading, "copying": copying, "tokens": samples.num_tokens}
    return Finding(words, figures, fast=rate >= OF_CEILING * ceiling)


def whole(bench: Bench, shape: str) -> Finding:
    """The prune with all there is; its plan is kept for other rows to compare theirs with."""
    before = bench.before()
    done = pruned(bench, shape, LACO, "sentences", bench.streaming())
    done.plan.save(bench.work / f"plan-{shape}.json")
    words, figures = _told(done.report["usage"], before, done.plan)
    return Finding(words, figures)


def within(bench: Bench, shape: str, vram: int) -> Finding:
    """The prune within ``vram``."""
    before = bench.before()
    done = pruned(bench, shape, LACO, "sentences", bench.streaming(vram))
    words, figures = _told(done.report["usage"], before, done.plan)
    like = _as_whole(bench, shape, done.plan)
    kept = bench.rehearsal or within_limits(figures["peaks"], vram)
    figures |= {"same_layers": like.same, "largest_difference": like.apart}
    return Finding(f"{words}; {like.words}", figures, holds=like.same and like.apart == 0.0 and kept)


def refused(bench: Bench, shape: str, vram: int, options: dict[str, Any], fewer: int = 0) -> Finding:
    """The search with too small a budget, and with the smallest that its error names."""
    wanted = fewer_layers(bench.shape(shape), fewer, SearchOptions(**options))
    given, samples, compute = (bench.source(shape), wanted), bench.calibration(), bench.compute()
    with recorded(prepare, "open_job") as opened:
        try:
            searched(*given, RunSettings(compute, samples, _only(bench, bench.pick(vram, 1 << 20))))
        except BudgetError as error:
            told = str(error)
        else:
            return Finding(f"{format_bytes(vram)} was not refused", {}, holds=False)
    read = opened[0].meter.bytes_read + opened[0].meter.summary()["bytes_read"]
    named = re.search(r"`v?ram_budget=(\d+)MiB", told)
    assert named is not None, told
    least = int(named[1]) << 20
    before = bench.before()
    found = searched(*given, RunSettings(compute, samples, _only(bench, least)), telling(bench))
    words, figures = _told(found.usage, before, found.plan)
    kept = bench.rehearsal or within_limits(figures["peaks"], least)
    words = f"refused with {format_bytes(read)} read, {format_bytes(least)} named as the least; with it {words}"
    return Finding(words, {**figures, "error": told, "read": read, "least": least}, holds=kept and read == 0)


def beside(bench: Bench, shape: str, left: int) -> Finding:
    """The prune with default budgets while another process holds most of the device."""
    with _held(bench, left) as (held, free):
        before = bench.before()
        done = pruned(bench, shape, LACO, "sentences", bench.streaming())
    words, figures = _told(done.report["usage"], before, done.plan)
    like = _as_whole(bench, shape, done.plan)
    words = f"{format_bytes(held)} held by another, {format_bytes(free)} left; {words}; {like.words}"
    figures |= {"held": held, "free": free, "same_layers": like.same, "largest_difference": like.apart}
    return Finding(words, figures, holds=like.same and like.apart == 0.0)


def _only(bench: Bench, num_bytes: int) -> Streaming:
    """A budget of ``num_bytes`` of the memory that weights are computed in."""
    return Streaming(ram_budget=num_bytes) if bench.rehearsal else Streaming(vram_budget=num_bytes)


@contextmanager
def _held(bench: Bench, left: int) -> Iterator[tuple[int, int]]:
    """Another process holds all but ``left`` bytes of the device; yields what it holds, and what is then free."""
    name = bench.device.name
    command = [sys.executable, "-c", _HOLD, name, str(left)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        line = other.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the process that was to hold memory ended, exit code {other.wait()}")
        yield int(line), torch.cuda.mem_get_info()[0] if name == "cuda" else 0
        other.stdin.close()


def seventy(bench: Bench, shape: str, vram: int, ram: int, options: dict[str, Any], fewer: int = 0) -> Finding:
    """A search on the sparse 70B within budgets."""
    wanted = fewer_layers(bench.shape(shape), fewer, SearchOptions(**options))
    settings = RunSettings(bench.compute(), bench.calibration(), bench.streaming(vram, ram))
    before = bench.before()
    found = searched(bench.source(shape), wanted, settings, telling(bench))
    words, figures = _told(found.usage, before, found.plan)
    return Finding(words, figures, holds=within_limits(figures["peaks"], vram, ram))


def _told(usage: Mapping[str, Any], before: MemorySample, plan: Plan) -> tuple[str, dict[str, Any]]:
    """A run in words and as figures."""
    found: Peaks = peaks(usage, before)
    figures = {"peaks": found, "usage": usage, "plan": plan.to_json(), "held_before": vars(before)}
    return f"{described(plan, usage)}; {described_peaks(found)}", figures


def _as_whole(bench: Bench, shape: str, plan: Plan) -> Likeness:
    """How ``plan`` compares with the one that ``whole`` kept."""
    return compared(Plan.load(bench.work / f"plan-{shape}.json"), plan)
