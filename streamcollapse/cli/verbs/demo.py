"""The demo: the whole job on a small trained model that ships with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json, strip
from streamcollapse.cli.tables import plan_rows, plan_strip
from streamcollapse.cli.text import lines_of, plain_console, table_of, unicode
from streamcollapse.cli.verbs.perplexity import score_json
from streamcollapse.settings.run import Calibration, Compute, Output, Repair, RunSettings
from streamcollapse.settings.search import SearchOptions
from streamcollapse.units import format_bytes

if TYPE_CHECKING:
    from streamcollapse.jobs.apply import Pruned
    from streamcollapse.jobs.perplexity import Score

DEMO_OPTIONS = SearchOptions(target_ratio=0.25)
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
    """Prune the small trained model that ships with the package by a quarter, as prune would by default but for fewer
    samples (ten sentences) and the repair, and compare perplexities."""
    with resources.as_file(resources.files("streamcollapse.data")) as data:
        from streamcollapse.jobs.perplexity import perplexity
        from streamcollapse.jobs.prune import prune
        from streamcollapse.output.checkpoint import REPORT_FILE

        output = Output(overwrite=_is_demo(out / REPORT_FILE))
        settings = RunSettings(compute, Calibration("sentences"), output=output, repair=Repair("none"))
        with live_progress(quiet=as_json) as listener:
            pruned = prune(data / MODEL, out, DEMO_OPTIONS, settings=settings, listener=listener)
            before = perplexity(data / MODEL, data / TEXT, settings=settings, listener=listener)
            after = perplexity(out, data / TEXT, settings=settings, listener=listener)
        if as_json:
            scores = {"before": score_json(before), "after": score_json(after)}
            print_json({"out": str(out), **pruned.report, "perplexity": scores})
        else:
            _show(pruned, before, after)


def _show(pruned: Pruned, before: Score, after: Score) -> None:
    """The demo's outcome: how it was found, and before against after."""
    console = plain_console()
    console.print(lines_of(plan_rows(pruned.plan)[2:]))  # without what the table has
    console.print()
    table = table_of(("", "stack", "layers", "weights", "perplexity"))
    whole = strip([1] * pruned.plan.num_source_layers, unicode=unicode())
    layers, sizes = pruned.report["layers"], pruned.report["bytes"]
    for name, stack, count, size, score in (
        ("before", whole, layers["before"], sizes["before"], before),
        ("after", plan_strip(pruned.plan), layers["after"], sizes["after"], after),
    ):
        table.add_row(name, stack, str(count), format_bytes(size), f"{score.perplexity:.2f}")
    console.print(table)
    console.print("In the stack, a number is that many layers collapsed into one.", style="dim")
    console.print(f"\nThe pruned model is in {pruned.out.resolve()}", markup=False)
