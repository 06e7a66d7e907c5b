"""The command ``streamcollapse``."""

import os
import sys

# Threads that wait for work sleep instead of spinning. Before torch is imported, which reads it once: spinning threads
# of two programs on the same cores hold each other up (docs/decisions/0008-waiting-threads.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from streamcollapse.cli.screen import print_json
from streamcollapse.cli.text import said
from streamcollapse.cli.verbs.apply import apply
from streamcollapse.cli.verbs.batch import batch
from streamcollapse.cli.verbs.bench import bench
from streamcollapse.cli.verbs.compare import compare
from streamcollapse.cli.verbs.convert import convert
from streamcollapse.cli.verbs.demo import demo
from streamcollapse.cli.verbs.inspect import inspect
from streamcollapse.cli.verbs.perplexity import perplexity
from streamcollapse.cli.verbs.plan import plan
from streamcollapse.cli.verbs.prune import prune
from streamcollapse.cli.verbs.report import report
from streamcollapse.cli.verbs.resume import resume
from streamcollapse.cli.verbs.search import search
from streamcollapse.cli.verbs.similarity import similarity
from streamcollapse.cli.verbs.speed import speed
from streamcollapse.cli.verbs.strategies import strategies
from streamcollapse.cli.verbs.verify import verify


class _Verbs(TyperGroup):
    """Mistakes in options are a JSON document as well, where that is what was asked for."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            if "--json" in sys.argv:
                print_json({"error": {"type": "UsageError", "message": said(error.format_message())}})
            raise


app = typer.Typer(
    name="streamcollapse",
    cls=_Verbs,
    help="Prune the depth of language models that do not fit in memory, by streamed layer collapse (LaCo).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for verb in (
    prune,
    search,
    strategies,
    apply,
    resume,
    inspect,
    similarity,
    perplexity,
    compare,
    report,
    convert,
    verify,
    batch,
    bench,
    speed,
    demo,
):
    app.command()(verb)
app.add_typer(plan)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"streamcollapse {version('streamcollapse')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
