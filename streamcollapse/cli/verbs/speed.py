"""The verb speed."""

import sys
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import print_json
from streamcollapse.run.first_checks import check_source

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
    from streamcollapse.cli import tables
    from streamcollapse.jobs.inspect import inspect
    from streamcollapse.jobs.speed import speed as run
    from streamcollapse.jobs.speed import speed_apart

    paths = [directory] if against is None else [directory, against]
    if against is None:
        found = [run(directory, new_tokens=new_tokens, repeat=repeat, settings=settings)]
    else:
        for path in paths:
            inspect(path, settings=settings)  # before minutes go into the other
        found = []
        for path in paths:
            print(f"measuring {path}", file=sys.stderr)
            found.append(speed_apart(path, new_tokens=new_tokens, repeat=repeat, settings=settings))
    print_json({"models": [s.to_json() for s in found]}) if as_json else tables.show_speed(found)
