"""The verb perplexity."""

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.run.first_checks import check_source
from streamcollapse.settings.run import EvaluationText

ScoredPlan = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        readable=False,
        metavar="PLAN",
        help="Score the pruned model that this plan makes of MODEL.",
        show_default="MODEL as it is",
    ),
]


@o.grouped
def perplexity(
    model: o.Model, text: EvaluationText, settings: o.Computing, plan: ScoredPlan = None, as_json: o.Json = False
) -> None:
    """Perplexity of MODEL on a text, with weights streamed; with --plan of what PLAN makes of it, unwritten."""
    check_source(model)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.perplexity import perplexity as run
    from streamcollapse.merge.plan import Plan

    parsed = None if plan is None else Plan.load(plan)
    with live_progress(quiet=as_json) as listener:
        score = run(model, text, plan=parsed, settings=settings, listener=listener)
    print_json(tables.score_json(score)) if as_json else tables.show_score(score, model)
