"""The verb evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.cli.text import plain_console, table_of
from streamcollapse.errors import printable
from streamcollapse.run.first_checks import check_source
from streamcollapse.settings.evaluate import Evaluating
from streamcollapse.units import format_seconds

if TYPE_CHECKING:
    from streamcollapse.jobs.evaluate import TaskResults

EvaluatedPlans = Annotated[
    list[Path] | None,
    typer.Option(
        "--plan",
        readable=False,
        metavar="PLAN",
        help="Evaluate the pruned model that this plan makes of MODEL as well. Repeatable.",
        show_default="MODEL alone",
    ),
]


@o.grouped
def evaluate(
    model: o.Model, asked: Evaluating, settings: o.Evaluated, plan: EvaluatedPlans = None, as_json: o.Json = False
) -> None:
    """Tasks of lm-evaluation-harness on MODEL, and on what plans make of it, with weights streamed."""
    check_source(model)
    from streamcollapse.jobs.evaluate import evaluate as run

    with live_progress(quiet=as_json) as listener:
        found = run(model, asked, plans=plan or [], settings=settings, listener=listener)
    print_json(evaluation_json(found)) if as_json else _show(found)


def _show(found: TaskResults) -> None:
    """A row for each metric of each task, a column for each model."""
    table = table_of(["task", "metric", *(f"{one.name}, {one.layers} layers" for one in found.models)], right=2)
    of = [{(task, metric): (value, error) for task, metric, value, error in one.rows} for one in found.models]
    previous = None
    for task, metric, _, _ in found.models[0].rows:
        cells = []
        for one in of:
            value, error = one.get((task, metric), (None, None))
            text = "" if value is None else f"{value:.4f}"
            cells.append(text if error is None else f"{text} ±{error:.4f}")
        table.add_row(printable(task) if task != previous else "", metric, *cells)
        previous = task
    console = plain_console()
    console.print(table)
    console.print(
        f"by lm-evaluation-harness; on {found.compute['device']} in {found.compute['dtype']}, in "
        f"{format_seconds(found.usage['seconds'])}",
        style="dim",
    )


def evaluation_json(found: TaskResults) -> dict[str, Any]:
    """The models with what the harness says of each, as JSON types."""
    models = [
        {"name": one.name, "layers": one.layers, "results": one.results["results"], "n-shot": one.results["n-shot"]}
        for one in found.models
    ]
    return {"models": models, "compute": found.compute, "usage": found.usage}
