"""The real job on a checkpoint, measured: what each phase took, against what this machine's disk and bus can do."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamcollapse.errors import OutputError
from streamcollapse.jobs.prepare import prepare_open
from streamcollapse.jobs.prune import run_prune
from streamcollapse.output.report import Report
from streamcollapse.progress import Listener, PhaseStarted, silent
from streamcollapse.resources.meter import MemorySample
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import IO_MODES, BenchConditions, Output, RunSettings
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.probe import cached_share, forget, read_rate
from streamcollapse.stream.copies import CudaCopies

_PROBE_BYTES = 1 << 30


@dataclass(frozen=True)
class Bench:
    """``report`` is that of the run; rates in bytes a second, None where they could not be measured.

    ``read_rates``: cold reads of the same files by I/O mode; ``copy_rate``: from pinned memory to the device;
    ``cached_before``: the share of the checkpoint that was in the page cache when the job began; ``timeline``: seconds
    since the start and the memory held then.
    """

    report: Report
    read_rates: dict[str, float | None]
    copy_rate: float | None
    cached_before: float
    timeline: list[tuple[float, MemorySample]]

    @property
    def read_ceiling(self) -> float | None:
        """The fastest of the ways to read."""
        return max((rate for rate in self.read_rates.values() if rate is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types; the timeline as seconds, resident and anonymous bytes."""
        points = [(round(t, 3), s.rss, s.anonymous) for t, s in self.timeline]
        return {
            "format": "streamcollapse.bench/1",
            "cached_before": self.cached_before,
            "read_rates": self.read_rates,
            "read_ceiling": self.read_ceiling,
            "copy_rate": self.copy_rate,
            "report": self.report,
            "timeline": points,
        }


def bench(
    source: str | Path,
    options: SearchOptions = SearchOptions(strategy="laco"),  # noqa: B008 - frozen
    *,
    conditions: BenchConditions = BenchConditions(),  # noqa: B008
    settings: RunSettings = RunSettings(),  # noqa: B008
    listener: Listener = silent,
) -> Bench:
    """Prune ``source`` into a directory that is removed again; without options by the paper's procedure, a quick job.
    Raises StreamCollapseError."""
    place = Path(tempfile.gettempdir() if conditions.scratch is None else conditions.scratch)
    if not place.is_dir():
        raise OutputError(f"{place}: is not a directory; choose another `scratch`")
    job = open_job(source, settings, listener)
    listener(PhaseStarted("probe"))
    if conditions.cold:  # for the probe too: it reads what is not in the page cache
        forget(job.checkpoint)
    rates = {mode: read_rate(job.checkpoint, mode, _PROBE_BYTES) for mode in IO_MODES if mode != "auto"}
    on_device = job.placement.device.type == "cuda"
    copy_rate = CudaCopies(job.placement.device).rate() if on_device else None
    if conditions.cold:
        forget(job.checkpoint)
    cached = cached_share(job.checkpoint)
    with tempfile.TemporaryDirectory(prefix="streamcollapse-bench-", dir=place) as directory:
        prepared = prepare_open(job, Path(directory) / "pruned", options, replace(settings, output=Output()))
        report = run_prune(prepared, resumable=False).report
    return Bench(report, rates, copy_rate, cached, list(job.meter.timeline.points))
