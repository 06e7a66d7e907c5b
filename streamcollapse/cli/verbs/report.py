"""The verb report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.cli.verbs.compare import Plans
from streamcollapse.run.first_checks import check_plan_path, check_source
from streamcollapse.settings.run import Comparing, Output

File = Annotated[
    Path,
    typer.Option(
        "--out", readable=False, metavar="FILE", help="Where to write the page.", rich_help_panel="The output"
    ),
]
How = Annotated[Comparing, o.Only(("source", "text", "max_tokens", "samples"))]


@o.grouped
def report(
    plans: Plans,
    out: File,
    conditions: How,
    settings: o.Computing,
    overwrite: o.OverwriteFile = False,
    as_json: o.Json = False,
) -> None:
    """One HTML page about plans of one source, or pruned models: stacks, decisions, loss against size, time and memory,
    and what they say."""
    check_plan_path(out, overwrite, "out")
    if conditions.source is not None:
        check_source(conditions.source)
    from streamcollapse.jobs.report import report as run

    settings = replace(settings, output=Output(overwrite=overwrite))
    with live_progress(quiet=as_json) as listener:
        found = run(plans, out, conditions=conditions, settings=settings, listener=listener)
    print_json(found.to_json()) if as_json else plain_console().print(lines_of([("page", str(out))]))
