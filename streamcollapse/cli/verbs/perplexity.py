"""The verb perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.run.first_checks import check_source
from streamcollapse.settings.run import EvaluationText
from streamcollapse.units import format_seconds

if TYPE_CHECKING:
    from streamcollapse.jobs.perplexity import Score

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
    from streamcollapse.jobs.perplexity import perplexity as run
    from streamcollapse.merge.plan import Plan

    parsed = None if plan is None else Plan.load(plan)
    with live_progress(quiet=as_json) as listener:
        score = run(model, text, plan=parsed, settings=settings, listener=listener)
    print_json(score_json(score)) if as_json else _show(score, model)


def _show(score: Score, path: str) -> None:
    """The outcome of ``perplexity``."""
    rows: list[tuple[str, str | Text]] = [
        ("checkpoint", path),
        ("perplexity", f"{score.perplexity:.4f}"),
        ("mean loss", f"{score.nll:.5f} nats per token, {score.bits_per_byte:.5f} bits per byte"),
        ("tokens", f"{score.tokens:,} predicted, in windows of {score.window}, one every {score.stride}"),
        ("layers", str(score.layers)),
        ("time", format_seconds(score.usage["seconds"])),
    ]
    plain_console().print(lines_of(rows))


def score_json(score: Score) -> dict[str, Any]:
    """The score as JSON types; an infinite perplexity is null."""
    return {
        "perplexity": score.perplexity if score.perplexity != float("inf") else None,
        "nll": score.nll,
        "tokens": score.tokens,
        "window": score.window,
        "usage": score.usage,
    }
