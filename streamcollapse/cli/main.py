"""The command ``streamcollapse``."""

import os
from collections.abc import Callable

# Threads that wait for work sleep instead of spinning. Before torch is imported, which reads it once: spinning threads
# of two programs on the same cores hold each other up (docs/decisions/0008-waiting-threads.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from typing import Annotated, Any

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
from streamcollapse.cli.verbs.evaluate import evaluate
from streamcollapse.cli.verbs.heal import heal
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


# Typer exports one of its usage errors: what all of them derive from is its base, with its own copy of click (0.29) or
# the package of that name (before).
_UsageError: Any = typer.BadParameter.__bases__[0]


class _Verbs(TyperGroup):
    """Mistakes in options are a JSON document as well, where that is what was asked for."""

    _in_json = False

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        self._in_json = "--json" in args
        return self._say(super().make_context, info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        return self._say(super().invoke, ctx)

    def _say(self, do: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return do(*arguments, **named)
        except _UsageError as error:
            if self._in_json:
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
    heal,
    resume,
    inspect,
    similarity,
    perplexity,
    evaluate,
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
