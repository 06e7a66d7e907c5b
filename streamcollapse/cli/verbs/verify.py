"""The verb verify."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.units import format_bytes

if TYPE_CHECKING:
    from streamcollapse.jobs.verify import Verification


@o.grouped
def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help=o.CHECKPOINT)],
    settings: o.Trust,
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="SOURCE", help="What DIR was pruned from.", show_default="not compared"),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Check the files of DIR: index, shapes, digests, every weight; with --source, that it is what its plan makes of
    it, bit by bit."""
    from streamcollapse.jobs.verify import verify as run

    with live_progress(quiet=as_json) as listener:
        found = run(directory, source, trust_remote_code=settings.trust_remote_code, listener=listener)
    print_json(found.to_json()) if as_json else show_verification(found)


def show_verification(found: Verification) -> None:
    """The outcome of ``verify``: all that it looked at is right."""
    digests = f"{found.digests} shards are what the report says" if found.digests else "none recorded"
    rows: list[tuple[str, str | Text]] = [
        ("checkpoint", found.path),
        ("layers", f"{found.layers}, names and shapes as the config says"),
        ("weights", f"{found.tensors} tensors, {format_bytes(found.num_bytes)}, no NaN or infinity"),
        ("digests", digests),
    ]
    if found.source is not None:
        rows.append(("recomputed", f"{found.recomputed} tensors from {found.source}, equal bit by bit"))
    plain_console().print(lines_of(rows))
