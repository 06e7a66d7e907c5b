"""The verb bench."""

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.run.first_checks import check_source
from streamcollapse.settings.run import BenchConditions
from streamcollapse.settings.search import SearchOptions

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
) -> None:
    """Prune SOURCE into a directory that is removed again, and say what each phase took against what the disk can
    do."""
    check_source(source)
    from streamcollapse.cli import plots, tables
    from streamcollapse.jobs.bench import bench as run

    if plot is not None:
        plots.check_plot(plot)
    with live_progress(quiet=as_json) as listener:
        found = run(source, method, conditions=conditions, settings=settings, listener=listener)
    if plot is not None:
        points = [
            (t, {"resident": s.rss, "anonymous": s.anonymous, "control group": s.group, "device": s.vram_device})
            for t, s in found.timeline
        ]
        phases = [(p["name"], p["seconds"]) for p in found.report["usage"]["phases"]]
        plots.plot_memory(points, phases, plot)
    print_json(found.to_json()) if as_json else tables.show_bench(found)
