"""The verb bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from streamcollapse.cli import options as o
from streamcollapse.cli.plots import sparkline
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.cli.text import lines_of, plain_console, table_of, unicode
from streamcollapse.run.first_checks import check_source
from streamcollapse.settings.run import BenchConditions
from streamcollapse.settings.search import SearchOptions
from streamcollapse.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from streamcollapse.jobs.bench import Bench

Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        readable=False,
        metavar="FILE",
        help="Draw memory over time (needs matplotlib).",
        show_default="no picture",
    ),
]


@o.grouped
def bench(
    source: o.Source,
    method: SearchOptions,
    settings: o.Searching,
    conditions: BenchConditions,
    plot: Plot = None,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Prune SOURCE into a directory that is removed again, and say what each phase took against what the disk can do.
    Without options of the method by laco, which is quick; with any, as prune does, its repair included."""
    check_source(source)
    from streamcollapse.cli import plots
    from streamcollapse.jobs.bench import bench as run

    if plot is not None:
        plots.check_plot(plot)
    with live_progress(as_json, verbose) as listener:
        options = SearchOptions(strategy="laco") if method == SearchOptions() else method  # none given: a quick job
        found = run(source, options, conditions=conditions, settings=settings, listener=listener)
    if plot is not None:
        points = [
            (t, {"resident": s.rss, "anonymous": s.anonymous, "control group": s.group, "device": s.vram_device})
            for t, s in found.timeline
        ]
        phases = [(p["name"], p["seconds"]) for p in found.report["usage"]["phases"]]
        plots.plot_memory(points, phases, plot)
    print_json(found.to_json()) if as_json else _show(found)


_PEAKS = {
    "peak_rss": "peak resident",
    "peak_anonymous_rss": "of it, anonymous",
    "peak_file_rss": "of it, mapped files",
    "peak_group": "peak of the control group",
    "peak_vram": "peak GPU, allocated",
    "peak_vram_reserved": "peak GPU, reserved",
    "peak_vram_device": "peak GPU, whole device",
}


def _show(found: Bench) -> None:
    """What each phase took, against what the disk can do, and memory over time."""
    report, console = found.report, plain_console()
    usage = report["usage"]
    phases = usage["phases"]
    table = table_of(("", *(phase["name"] for phase in phases)), right=1)
    table.add_row("time", *(format_seconds(p["seconds"]) for p in phases))
    table.add_row("waiting for weights", *(format_seconds(p["seconds_waiting"]) for p in phases))
    table.add_row("read", *(format_bytes(p["bytes_read"]) for p in phases))
    rates = [p["bytes_read"] / p["seconds_reading"] if p["seconds_reading"] else None for p in phases]
    table.add_row("read rate", *(_rate(rate) for rate in rates))
    table.add_row("written", *(format_bytes(p["bytes_written"]) for p in phases))
    for key, words in _PEAKS.items():
        if any(phase[key] is not None for phase in phases):
            table.add_row(words, *(_size(phase[key]) for phase in phases))
    console.print(table)
    probed = ", ".join(f"{mode} {_rate(rate)}" for mode, rate in found.read_rates.items())
    points = [(t, float(s.rss)) for t, s in found.timeline]
    rows: list[tuple[str, str | Text]] = [
        ("layers", f"{report['layers']['before']} -> {report['layers']['after']}"),
        (
            "cold reads here",
            probed if found.read_ceiling else "not measured: too small, or too much of it in the page cache",
        ),
        ("in page cache", f"{100 * found.cached_before:.0f} % of the checkpoint when the job began"),
        ("read through", f"{usage['memory']['io']}, {usage['memory']['resident_layers']} layers resident"),
    ]
    if found.copy_rate is not None:
        rows.append(("copies to the GPU", _rate(found.copy_rate)))
    rows += [
        ("total", f"{format_seconds(usage['seconds'])}, {format_bytes(usage['bytes_read'])} read"),
        ("resident memory", f"{sparkline(points, 60, unicode())}  up to {format_bytes(usage['peak_rss'])}"),
    ]
    console.print()
    console.print(lines_of(rows))


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:.2f} GB/s"


def _size(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)
