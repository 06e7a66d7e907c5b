"""What a person sees: the stack as a strip of cells, one-line errors, live progress. A skin: decides nothing."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from streamcollapse.cli.signals import end_in_order, exit_code_of
from streamcollapse.cli.status import Minutes, Status, expected_words
from streamcollapse.cli.text import said
from streamcollapse.errors import StreamCollapseError, printable
from streamcollapse.progress import (
    CandidateStarted,
    DecisionMade,
    Event,
    Listener,
    MemoryPlanned,
    NoteMade,
    PhaseStarted,
    StackChanged,
    TimeExpected,
    WarningRaised,
)
from streamcollapse.units import format_bytes

_BAR_CELLS = 24


@contextmanager
def one_line_errors(as_json: bool = False) -> Iterator[None]:
    """Turn the library's errors into one line on stderr and exit code 1, a signal into 128 and its number; ``as_json``:
    the errors into a document on stdout as well.

    What the libraries below would print on their own (warnings, log lines) is kept off the screen.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the screen has its own
    end_in_order()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except StreamCollapseError as error:
        print(f"error: {said(error)}", file=sys.stderr)
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": said(error)}})
        raise typer.Exit(1) from None
    except OSError as error:  # a path or a stream that nothing below could make sense of
        where = "" if error.filename is None else f"{printable(error.filename)}: "
        print(f"error: {where}{printable(error.strerror or error)}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        text = printable(interrupt) or "the run was not finished; the same command starts it again"
        print(f"interrupted: {text}", file=sys.stderr)
        raise typer.Exit(exit_code_of(interrupt)) from None


def print_json(document: Any) -> None:
    """``document`` as the last line of stdout."""
    print(json.dumps(document, allow_nan=False, default=str))


def strip(cells: Sequence[int], tested: range = range(0), unicode: bool = True) -> Text:
    """The stack, bottom layer first: a block for a layer of its own, a number for a cell that covers several.

    Cells at positions in ``tested`` are highlighted.
    """
    text = Text()
    for position, count in enumerate(cells):
        mark = ("■" if unicode else "#") if count == 1 else (str(count) if count < 10 else "+")
        style = "black on yellow" if position in tested else ("blue" if count == 1 else "bold white on magenta")
        text.append(mark, style)
    return text


_MEMORY = {"ram": "memory", "vram": "GPU memory"}


def needs_table(needs: Sequence[tuple[str, str, int, str]], budgets: dict[str, int]) -> Table:
    """What each phase holds, phase by phase, with its sum beside what may be held."""
    table = Table.grid(padding=(0, 2))
    for kind, words in _MEMORY.items():
        for phase in dict.fromkeys(need[0] for need in needs):
            chosen = [need for need in needs if need[0] == phase and need[3] == kind and need[2]]
            for number, (_, what, num_bytes, _) in enumerate(chosen):
                table.add_row(f"  {phase if number == 0 else ''}", what, Text(format_bytes(num_bytes), justify="right"))
            if chosen:
                limit = f"of {format_bytes(budgets[kind])} {words}" if kind in budgets else words
                total = Text(format_bytes(sum(need[2] for need in chosen)), "bold", justify="right")
                table.add_row("", "", total, Text(limit, "dim"))
    return table


_NEAR = 0.85  # of what may be held; from there on it matters for what it is held


def memory_shown(needs: Sequence[tuple[str, str, int, str]], budgets: dict[str, int], verbose: bool) -> Table | Text:
    """What will be held at the most, in a line; phase by phase where that is near what may be held, or ``verbose``."""
    parts, near = [], False
    for kind, words in _MEMORY.items():
        phases = {need[0] for need in needs}
        most = max((sum(n[2] for n in needs if (n[0], n[3]) == (phase, kind)) for phase in phases), default=0)
        if most:
            near = near or most > _NEAR * budgets.get(kind, math.inf)
            limit = f" of {format_bytes(budgets[kind])}" if kind in budgets else ""
            parts.append(f"{format_bytes(most)}{limit} {words}")
    if verbose or near:
        return needs_table(needs, budgets)
    return Text(f"{'memory':<11}", "bold").append(f"at most {', '.join(parts)}", "not bold dim")


@contextmanager
def live_progress(quiet: bool, verbose: bool = False) -> Iterator[Listener]:
    """A listener that draws on stderr while the body runs; where stderr is no terminal, it writes a line a minute.
    ``quiet``: it only warns; ``verbose``: it says for what memory is held."""
    console = Console(stderr=True, markup=False, emoji=False)
    if quiet:
        yield _warn
        return
    if not console.is_terminal:
        minutes = Minutes(lambda line: print(line, file=sys.stderr, flush=True), time.monotonic)

        def listener(event: Event) -> None:
            _say(event)
            minutes.listen(event)

        yield listener
        return
    view = _View(unicode="utf" in (console.encoding or "").lower(), verbose=verbose)
    with Live(view, console=console, refresh_per_second=12, transient=False):
        yield view.listen


def _say(event: Event) -> None:
    if isinstance(event, NoteMade):
        print(said(event.text), file=sys.stderr)
    _warn(event)


def _warn(event: Event) -> None:
    if isinstance(event, WarningRaised):
        print(f"warning: {said(event.text)}", file=sys.stderr)


def steps_bar(*more: ProgressColumn) -> Progress:
    """Rows of a name, a bar and ``more``, to be drawn as a part of a screen."""
    return Progress(TextColumn("[bold]{task.description:<10}"), BarColumn(_BAR_CELLS), *more, auto_refresh=False)


class _View:
    """The state of the screen: what was planned, a line per phase, the stack, the candidate under test."""

    def __init__(self, unicode: bool, clock: Callable[[], float] = time.monotonic, verbose: bool = False) -> None:
        self._unicode, self._verbose = unicode, verbose
        self._status = Status(clock)
        self._notes: list[Text | Table] = []
        self._phases = steps_bar(TextColumn("{task.fields[words]}", style="dim", markup=False))
        self._candidate: CandidateStarted | None = None
        self._last: DecisionMade | None = None
        self._threshold: float | None = None
        self._decided = [0, 0]
        self._cells: tuple[int, ...] = ()

    def listen(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self._finish_phase()
            self._phases.add_task(event.name, total=event.total_steps, words="")
        self._status.listen(event)
        match event:
            case CandidateStarted():
                self._candidate, self._threshold = event, event.threshold
            case DecisionMade():
                self._candidate, self._last = None, event
                self._decided[0 if event.accepted else 1] += 1
            case StackChanged(cells):
                self._cells = cells
            case MemoryPlanned(needs, budgets, _):
                self._notes.append(memory_shown(needs, budgets, self._verbose))
            case NoteMade(text):
                self._notes.append(Text(said(text)))
            case TimeExpected():
                self._notes.append(Text(f"{'expected':<11}", "bold").append(expected_words(event), "not bold dim"))
            case WarningRaised(text):
                self._notes.append(Text(f"warning: {said(text)}", "yellow"))

    def _finish_phase(self) -> None:
        for task in self._phases.tasks[-1:]:
            whole = task.completed or 1
            self._phases.update(task.id, total=whole, completed=whole, words=self._status.summary())

    def _show_phase(self) -> None:
        for task in self._phases.tasks[-1:]:
            done, total = self._status.done
            self._phases.update(task.id, completed=done, total=total, words="  ".join(self._status.at()))

    def __rich__(self) -> Group:
        self._show_phase()
        lines: list[RenderableType] = [*self._notes, self._phases]
        if self._cells:
            lines.append(self._stack_line())
        if self._status.round_words():
            lines.append(Text(" " * 11 + self._status.round_words()))
        if self._status.phase == "search":
            lines.append(self._candidate_line())
        return Group(*lines)

    def _stack_line(self) -> Text:
        tested = range(0)
        if self._candidate is not None:
            tested = range(self._candidate.pointer - 1, self._candidate.pointer + self._candidate.merged)
        line = Text(f"{'stack':<11}", "bold").append(strip(self._cells, tested, self._unicode))
        return line.append(f"  {sum(self._cells)} -> {len(self._cells)} layers", "dim")

    def _candidate_line(self) -> Text:
        line, last, next_one = Text(" " * 11), self._last, self._candidate
        if last is not None:
            sign, verdict = (">", "merged") if last.accepted else ("<=", "rejected")
            limit = "" if self._threshold is None else f" {sign} T = {self._threshold:g}"
            what = "skipped" if last.similarity is None else f"{last.similarity:.4f}{limit}, {verdict}"
            line.append(f"layer {last.pointer - 1}: {what}", "green" if last.accepted else "red")
            line.append(f"  {self._decided[0]} of {sum(self._decided)} merged", "dim")
        if next_one is not None:
            line.append(f"{'  next: ' if last else ''}layer {next_one.pointer - 1}")
        return line
