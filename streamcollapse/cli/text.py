"""Plain lines on standard output."""

import re
import sys
from collections.abc import Iterable
from functools import cache

from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamcollapse.errors import printable
from streamcollapse.settings import run
from streamcollapse.settings.declared import declared
from streamcollapse.settings.search import SearchOptions

_GROUPS = (SearchOptions, run.RunSettings, run.EvaluationText, run.Comparing, run.BenchConditions, run.Cluster)
_OF_VERBS = {"out", "plan"}  # options that are no settings
_SETTING = re.compile(r"`([a-z_]+)(?:=(\w+))?`")
_WIDE = 10_000  # columns


def plain_console() -> Console:
    """Standard output, as it is: nothing in a name is acted on, no line is wrapped.

    Off a terminal tables are as wide as they come: what reads them needs whole names.
    """
    width = None if sys.stdout.isatty() else _WIDE
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


@cache
def _options() -> set[str]:
    return {name for group in _GROUPS for name in declared(group)} | _OF_VERBS


def said(text: object) -> str:
    """A message of the library as the command line says it: `work_dir` is --work-dir, and nothing acts on a terminal.

    The library names settings as Python and files of jobs do.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in _options():  # a library below quotes a name of its own
            return match[0]
        return f"--{name.replace('_', '-')}{'' if value is None else f' {value}'}"

    return _SETTING.sub(option, printable(text))


def unicode() -> bool:
    """Whether standard output takes blocks and bars."""
    return "utf" in (sys.stdout.encoding or "").lower()


def lines_of(rows: list[tuple[str, str | Text]]) -> Text:
    """A line per row, never wrapped, so that paths can be copied from any terminal."""
    width = max(len(key) for key, _ in rows) + 2
    lines = []
    for key, value in rows:
        line = Text(f"{key:<{width}}", "bold")
        lines.append(line.append(Text(printable(value), "not bold") if isinstance(value, str) else value))
    return Text("\n").join(lines)


def table_of(headings: Iterable[str], right: int = 99) -> Table:
    """A table without lines, whose columns are ranged left, or from column ``right`` on to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, justify="right" if number >= right else "left")
    return table
