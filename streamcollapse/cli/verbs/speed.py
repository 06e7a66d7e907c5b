"""The verb speed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import print_json
from streamcollapse.cli.text import plain_console, table_of
from streamcollapse.errors import printable
from streamcollapse.run.first_checks import check_source
from streamcollapse.units import format_bytes

if TYPE_CHECKING:
    from streamcollapse.jobs.speed import Speed

Against = Annotated[
    str | None, typer.Option("--against", metavar="SOURCE", help="Another checkpoint, to compare.", show_default="none")
]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Tokens to generate.")]
Repeat = Annotated[int, typer.Option("--repeat", help="Measured runs; the median counts.")]


@o.grouped
def speed(
    directory: Annotated[str, typer.Argument(metavar="DIR", help=o.CHECKPOINT)],
    settings: o.Computing,
    against: Against = None,
    new_tokens: NewTokens = 64,
    repeat: Repeat = 3,
    as_json: o.Json = False,
) -> None:
    """Memory and generated tokens per second of DIR, loaded as a whole; beside those of SOURCE with --against."""
    for path in (directory, against):
        if path is not None:
            check_source(path)
    from streamcollapse.jobs.inspect import inspect
    from streamcollapse.jobs.speed import speed as run

    paths = [directory] if against is None else [directory, against]
    for path in paths[1:]:
        inspect(path, settings=settings)  # before minutes go into the other
    found = []
    for path in paths:
        print(f"measuring {path}", file=sys.stderr)
        own = against is not None
        found.append(run(path, new_tokens=new_tokens, repeat=repeat, settings=settings, own_process=own))
    print_json({"models": [s.to_json() for s in found]}) if as_json else _show(found)


def _show(found: Sequence[Speed]) -> None:
    """Models side by side, as in the paper's Table 5; the first against the last."""
    table = table_of(("model", "layers", "weights", "memory", "tokens/s", "from", "to"), right=1)
    for model in found:
        sizes = (format_bytes(model.weights), format_bytes(model.memory))
        rates = (model.tokens_per_second, min(model.runs), max(model.runs))
        table.add_row(printable(model.path), str(model.layers), *sizes, *(f"{rate:.2f}" for rate in rates))
    first, last = found[0], found[-1]
    if first is not last:
        faster = first.tokens_per_second / last.tokens_per_second
        table.add_row(
            "ratio",
            f"{first.layers / last.layers:.2f}",
            f"{first.weights / last.weights:.2f}",
            f"{first.memory / max(last.memory, 1):.2f}",
            f"{faster:.2f}",
        )
    console = plain_console()
    console.print(table)
    console.print(
        f"{first.new_tokens} tokens, greedy, on {first.device} in {first.dtype}; median of {len(first.runs)} runs",
        style="dim",
        markup=False,
    )
