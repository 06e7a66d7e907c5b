"""The verbs that measure: bench and speed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.grouped import grouped
from streamcollapse.cli.screen import live_progress, one_line_errors, print_json
from streamcollapse.settings import Calibration, Compute, Streaming
from streamcollapse.strategy.collapse import CollapseOptions

Scratch = Annotated[
    Path | None,
    typer.Option(
        "--scratch",
        readable=False,
        metavar="DIR",
        help="Where the pruned checkpoint is written before it is removed.",
        show_default="the system's temporary directory",
    ),
]
Cold = Annotated[bool, typer.Option("--cold", help="Drop SOURCE from the page cache first.")]
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
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="SOURCE", help="Another checkpoint, to compare.", show_default="none"),
]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Tokens to generate.")]
Repeat = Annotated[int, typer.Option("--repeat", help="Measured runs; the median counts.")]


@grouped
def bench(
    source: o.Source,
    method: CollapseOptions,
    samples: Calibration,
    compute: Compute,
    streaming: Streaming,
    scratch: Scratch = None,
    cold: Cold = False,
    plot: Plot = None,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Prune SOURCE into a directory that is removed again, and say what each phase took against what the disk can
    do."""
    from streamcollapse.cli import plots, tables
    from streamcollapse.jobs.bench import bench as run

    if plot is not None:
        plots.check_plot(plot)
    with live_progress(quiet=as_json) as listener:
        found = run(
            source,
            method,
            calibration=samples,
            compute=compute,
            streaming=streaming,
            scratch=scratch,
            cold=cold,
            trust_remote_code=trust_remote_code,
            listener=listener,
        )
    if plot is not None:
        points = [
            (t, {"resident": s.rss, "anonymous": s.anonymous, "control group": s.group, "device": s.vram_device})
            for t, s in found.timeline
        ]
        phases = [(p["name"], p["seconds"]) for p in found.report["usage"]["phases"]]
        plots.plot_memory(points, phases, plot)
    print_json(found.to_json()) if as_json else tables.show_bench(found)


def speed(
    directory: Annotated[str, typer.Argument(metavar="DIR", help=o.CHECKPOINT)],
    against: Against = None,
    new_tokens: NewTokens = 64,
    repeat: Repeat = 3,
    device: o.Device = o.COMPUTE.device,
    compute_dtype: o.ComputeDtype = o.COMPUTE.dtype,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Memory and generated tokens per second of DIR, loaded as a whole; beside those of SOURCE with --against."""
    with one_line_errors():
        from streamcollapse.cli import tables
        from streamcollapse.jobs.inspect import inspect
        from streamcollapse.jobs.speed import speed as run
        from streamcollapse.jobs.speed import speed_apart

        compute = Compute(device, compute_dtype)
        if against is None:
            found = [
                run(
                    directory,
                    new_tokens=new_tokens,
                    repeat=repeat,
                    compute=compute,
                    trust_remote_code=trust_remote_code,
                )
            ]
        else:
            arguments = ["--new-tokens", str(new_tokens), "--repeat", str(repeat)]
            arguments += ["--device", device, "--compute-dtype", compute_dtype]
            arguments += ["--trust-remote-code"] if trust_remote_code else []
            found = []
            for path in (directory, against):
                inspect(path, compute=compute, trust_remote_code=trust_remote_code)  # before minutes go into the other
            for path in (directory, against):
                print(f"measuring {path}", file=sys.stderr)
                found.append(speed_apart(path, arguments))
        print_json({"models": [s.to_json() for s in found]}) if as_json else tables.show_speed(found)
