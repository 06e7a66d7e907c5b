"""The verb compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.cli.text import plain_console, table_of
from streamcollapse.errors import printable
from streamcollapse.run.first_checks import check_source
from streamcollapse.settings.run import Comparing
from streamcollapse.units import format_bytes

if TYPE_CHECKING:
    from streamcollapse.output.results import Comparison

Plans = Annotated[
    list[Path],
    typer.Argument(readable=False, metavar="PLAN...", help="Plans of one source, or directories of pruned models."),
]
How = Annotated[Comparing, o.Only(("source", "text", "max_tokens", "speed", "scratch"))]


@o.grouped
def compare(plans: Plans, conditions: How, settings: o.Computing, as_json: o.Json = False) -> None:
    """Plans of one source beside each other: size, loss on a held-out text, and speed. Layers are streamed once for
    all."""
    if conditions.source is not None:
        check_source(conditions.source)
    from streamcollapse.jobs.compare import compare as run

    with live_progress(quiet=as_json) as listener:
        found = run(plans, conditions=conditions, settings=settings, listener=listener)
    print_json(found.to_json()) if as_json else _show(found)


def _show(found: Comparison) -> None:
    """The models in a table, the source first."""
    fast = found.models[0].tokens_per_second is not None
    headings = ["model", "method", "layers", "weights", "of it", "loss", "rise", "perplexity"]
    table = table_of([*headings, "tokens/s"] if fast else headings, right=2)
    for model in found.models:
        size = (format_bytes(model.num_bytes), f"{100 * model.num_bytes / found.models[0].num_bytes:.1f} %")
        losses = ["overflows", "", ""]
        if model.nll is not None and model.rise is not None and model.perplexity is not None:
            losses = [f"{model.nll:.4f}", f"{model.rise:+.4f}", f"{model.perplexity:.2f}"]
        rate = [] if model.tokens_per_second is None else [f"{model.tokens_per_second:.2f}"]
        table.add_row(printable(model.name), printable(model.method), str(model.layers), *size, *losses, *rate)
    console = plain_console()
    console.print(table)
    console.print(
        f"loss: nats per token, on {found.tokens:,} tokens of the text {found.text}; on {found.compute['device']} in "
        f"{found.compute['dtype']}",
        style="dim",
    )
