"""The demo: the whole job on a small trained model that ships with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, one_line_errors, print_json
from streamcollapse.settings import Compute, Output
from streamcollapse.strategy.collapse import CollapseOptions

DEMO_OPTIONS = CollapseOptions(layers_per_merge=4, interval=1, threshold=0.9)
MODEL, TEXT = "wiki-llama-24l", "text/wiki_eval.txt"

DemoOut = Annotated[
    Path,
    typer.Option(
        "--out", readable=False, metavar="DIR", help="Where to put the pruned model; an older demo there is replaced."
    ),
]


def _is_demo(report: Path) -> bool:
    """Whether an earlier demo wrote ``report``: only what it wrote is replaced."""
    try:
        return bool(json.loads(report.read_text(encoding="utf-8"))["source"]["name"] == MODEL)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def demo(
    out: DemoOut = Path("streamcollapse-demo"),
    device: o.Device = o.COMPUTE.device,
    compute_dtype: o.ComputeDtype = o.COMPUTE.dtype,
    as_json: o.Json = False,
) -> None:
    """Prune the small trained model that ships with the package (C=4, I=1, T=0.9) and compare perplexities."""
    with one_line_errors(), resources.as_file(resources.files("streamcollapse.data")) as data:
        from streamcollapse.cli import tables
        from streamcollapse.jobs.perplexity import perplexity
        from streamcollapse.jobs.prune import prune
        from streamcollapse.output.checkpoint import REPORT_FILE

        compute = Compute(device, compute_dtype)
        output = Output(overwrite=_is_demo(out / REPORT_FILE))
        with live_progress(quiet=as_json) as listener:
            pruned = prune(data / MODEL, out, DEMO_OPTIONS, compute=compute, output=output, listener=listener)
            before = perplexity(data / MODEL, data / TEXT, compute=compute, listener=listener)
            after = perplexity(out, data / TEXT, compute=compute, listener=listener)
        if as_json:
            scores = {"before": tables.score_json(before), "after": tables.score_json(after)}
            print_json({"out": str(out), **pruned.report, "perplexity": scores})
        else:
            tables.show_demo(pruned, before, after)
