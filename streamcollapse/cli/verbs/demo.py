"""The demo: the whole job on a small trained model that ships with the package."""

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.settings.run import Compute, Output, RunSettings
from streamcollapse.settings.search import SearchOptions

DEMO_OPTIONS = SearchOptions(layers_per_merge=4, interval=1, threshold=0.9)
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


@o.grouped
def demo(compute: Compute, out: DemoOut = Path("streamcollapse-demo"), as_json: o.Json = False) -> None:
    """Prune the small trained model that ships with the package (C=4, I=1, T=0.9) and compare perplexities."""
    with resources.as_file(resources.files("streamcollapse.data")) as data:
        from streamcollapse.cli import tables
        from streamcollapse.jobs.perplexity import perplexity
        from streamcollapse.jobs.prune import prune
        from streamcollapse.output.checkpoint import REPORT_FILE

        settings = RunSettings(compute, output=Output(overwrite=_is_demo(out / REPORT_FILE)))
        with live_progress(quiet=as_json) as listener:
            pruned = prune(data / MODEL, out, DEMO_OPTIONS, settings=settings, listener=listener)
            before = perplexity(data / MODEL, data / TEXT, settings=settings, listener=listener)
            after = perplexity(out, data / TEXT, settings=settings, listener=listener)
        if as_json:
            scores = {"before": tables.score_json(before), "after": tables.score_json(after)}
            print_json({"out": str(out), **pruned.report, "perplexity": scores})
        else:
            tables.show_demo(pruned, before, after)
