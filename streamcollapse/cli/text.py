"""Plain lines on standard output."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from streamcollapse.errors import printable

_WIDE = 10_000  # columns


def plain_console() -> Console:
    """Standard output, as it is: nothing in a name is acted on, no line is wrapped.

    Off a terminal tables are as wide as they come: what reads them needs whole names.
    """
    width = None if sys.stdout.isatty() else _WIDE
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


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
