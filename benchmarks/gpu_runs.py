"""Jobs as rows of gpu_day.py run them, and what they used: seconds, bytes, peaks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpu_bench import Bench
from gpu_devices import gigabytes
from make_checkpoint import Shape

from streamcollapse.jobs.apply import Pruned
from streamcollapse.jobs.prepare import prepare_prune, prepare_search
from streamcollapse.jobs.prune import run_prune
from streamcollapse.jobs.search import run_search
from streamcollapse.merge.plan import Plan
from streamcollapse.progress import DecisionMade, Event, Listener, PhaseStarted, silent
from streamcollapse.resources.meter import MemorySample
from streamcollapse.settings.run import RunSettings, Streaming
from streamcollapse.settings.search import SearchOptions
from streamcollapse.units import format_bytes, format_seconds

Peaks = dict[str, int | None]
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class Searched:
    """A search: its plan, and as in a report of ``prune`` what it used and how memory was to be spent."""

    plan: Plan
    usage: Mapping[str, Any]


def pruned(bench: Bench, shape: str, options: SearchOptions, kind: str | None, streaming: Streaming) -> Pruned:
    """Prune the checkpoint ``shape`` into a directory that is removed again."""
    settings, out = RunSettings(bench.compute(), bench.calibration(kind), streaming), bench.place / "out"
    try:
        return run_prune(prepare_prune(bench.source(shape), out, options, settings, telling(bench)), resumable=False)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def searched(source: Path, options: SearchOptions, settings: RunSettings, listener: Listener = silent) -> Searched:
    """``search``, with what it used."""
    prepared = prepare_search(source, options, settings, listener=listener)
    plan = run_search(prepared)
    return Searched(plan, {**prepared.job.meter.summary(), "memory": prepared.memory.to_json()})


@contextmanager
def recorded(module: Any, name: str) -> Iterator[list[Any]]:
    """What the function ``name`` of ``module`` returns while the body runs, call by call."""
    original: Callable[..., Any] = getattr(module, name)
    found: list[Any] = []

    def recording(*given: Any, **settings: Any) -> Any:
        found.append(original(*given, **settings))
        return found[-1]

    with patch.object(module, name, recording):
        yield found


def telling(bench: Bench) -> Listener:
    """A listener that notes how far a job has come."""
    start, decisions, phases = time.perf_counter(), 0, dict[str, str]()

    def listener(event: Event) -> None:
        nonlocal decisions
        if isinstance(event, PhaseStarted | DecisionMade):
            decisions += isinstance(event, DecisionMade)
            after = format_seconds(time.perf_counter() - start)
            if isinstance(event, PhaseStarted):
                phases[event.name] = after
            bench.note(phases=phases, decisions=decisions, after=after)

    return listener


def fewer_layers(shape: Shape, fewer: int, options: SearchOptions) -> SearchOptions:
    """``options`` with ``fewer`` layers less as the target; 0 is none."""
    return options.but(target_layers=shape.layers - fewer) if fewer else options


@dataclass(frozen=True)
class Likeness:
    """Whether two plans have the ``same`` layers, and how far ``apart`` two similarities are at most; None where the
    searches went different ways."""

    same: bool
    apart: float | None
    words: str


def compared(one: Plan, other: Plan) -> Likeness:
    """How alike two searches came out."""
    ours, theirs = (() if plan.search is None else plan.search.decisions for plan in (one, other))
    ways = [[(d.l, d.merged, d.accepted, d.rule) for d in decisions] for decisions in (ours, theirs)]
    same = one.layers == other.layers
    words = f"the same {one.num_layers} layers" if same else f"other layers ({one.num_layers}, and {other.num_layers})"
    if ways[0] != ways[1]:
        return Likeness(same, None, f"{words}, {len(ours)} and {len(theirs)} decisions that differ")
    pairs = [(a.similarity, b.similarity) for a, b in zip(ours, theirs, strict=True)]
    for a, b in zip(ours, theirs, strict=True):
        pairs += [(value, (b.tried or {}).get(rule)) for rule, value in (a.tried or {}).items()]
    apart = max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)
    how = f"at most {apart:.1e} apart" if apart else "equal"
    return Likeness(same, apart, f"{words}, similarities of {len(ours)} decisions {how}")


def peaks(usage: Mapping[str, Any], before: MemorySample) -> Peaks:
    """The most that was held: reserved by the allocator in all; beyond ``before`` on the device, and by the process."""
    on_device = usage["peak_vram_device"]
    return {
        "allocator": usage["peak_vram_reserved"],
        "device": None if on_device is None or before.vram_device is None else on_device - before.vram_device,
        "process": usage["peak_rss"] - before.rss,
    }


def within_limits(found: Peaks, vram: int | None = None, ram: int | None = None) -> bool:
    """Whether allocator and process stayed within the limits that there are; what is not known counts for nothing."""
    pairs = ((found["allocator"], vram), (found["process"], ram))
    return all(peak is None or limit is None or peak <= limit for peak, limit in pairs)


def described_peaks(found: Peaks) -> str:
    """The peaks in words."""
    names = {"allocator": "by the allocator", "device": "by the device", "process": "of memory"}
    return "peak " + ", ".join(f"{format_bytes(v)} {names[k]}" for k, v in found.items() if v is not None)


def described(plan: Plan, usage: Mapping[str, Any]) -> str:
    """A run in words: layers, what stayed on the device, seconds of each phase and, where it moved more than a norm or
    two, how fast it read, or wrote."""
    memory, parts = usage["memory"], []
    for phase in usage["phases"]:
        verb = "written" if phase["bytes_written"] else "read"
        moved, seconds = phase[f"bytes_{verb}"], phase["seconds"]
        rate = f" ({format_bytes(moved)} {verb}, {gigabytes(moved, seconds)})" if moved > _SMALL_BYTES else ""
        parts.append(f"{phase['name']} {format_seconds(seconds)}{rate}")
    layers = f"{plan.num_source_layers} -> {plan.num_layers} layers"
    return f"{layers}, {memory['resident_layers']} resident, by {memory['io']}; {', '.join(parts)}"


def seconds_of(usage: Mapping[str, Any], *names: str) -> float:
    """Seconds of the phases ``names`` together."""
    return sum(float(phase["seconds"]) for phase in usage["phases"] if phase["name"] in names)
