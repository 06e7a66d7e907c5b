"""What a person sees: the stack as a strip of cells, one-line errors, live progress. A skin: decides nothing."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streamcollapse.cli.signals import end_in_order, exit_code_of
from streamcollapse.cli.text import said
from streamcollapse.errors import StreamCollapseError, printable
from streamcollapse.progress import (
    CandidateStarted,
    DecisionMade,
    Event,
    FileFetched,
    LayerDone,
    Listener,
    MemoryPlanned,
    PhaseStarted,
    StackChanged,
    TensorChecked,
    TensorWritten,
    WarningRaised,
)
from streamcollapse.units import format_bytes, format_seconds

_BAR_CELLS = 24


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the library's errors into one line on stderr and exit code 1, a signal into 128 and its number.

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


@contextmanager
def live_progress(quiet: bool) -> Iterator[Listener]:
    """A listener that draws on stderr while the body runs; when ``quiet`` or stderr is no terminal it only warns."""
    console = Console(stderr=True, markup=False, emoji=False)
    if quiet or not console.is_terminal:
        yield _warn
        return
    view = _View(unicode="utf" in (console.encoding or "").lower())
    with Live(view, console=console, refresh_per_second=12, transient=False):
        yield view.listen


def _warn(event: Event) -> None:
    if isinstance(event, WarningRaised):
        print(f"warning: {said(event.text)}", file=sys.stderr)


class _View:
    """The state of the screen: one line per phase, the candidate under test, the stack."""

    def __init__(self, unicode: bool) -> None:
        self._unicode = unicode
        self._finished: list[Text | Table] = []
        self._phase: str | None = None
        self._started = 0.0
        self._steps = 0
        self._total: int | None = None
        self._bytes = 0
        self._layer: tuple[int, int] | None = None
        self._candidate: CandidateStarted | None = None
        self._last: DecisionMade | None = None
        self._decided = [0, 0]
        self._threshold: float | None = None
        self._cells: tuple[int, ...] = ()
        self._num_layers = 0

    def listen(self, event: Event) -> None:
        match event:
            case PhaseStarted(name, total):
                self._finish_phase()
                self._phase, self._total, self._started = name, total, time.perf_counter()
                self._steps, self._bytes, self._layer = 0, 0, None
            case LayerDone(index, count, num_bytes):
                self._steps += 1
                self._bytes += num_bytes
                self._layer = (index, count)
            case TensorWritten(_, num_bytes):
                self._steps += 1
                self._bytes += num_bytes
            case TensorChecked(_, num_bytes) | FileFetched(_, num_bytes):
                self._steps += 1
                self._bytes += num_bytes
            case CandidateStarted():
                self._candidate, self._threshold = event, event.threshold
            case DecisionMade():
                self._candidate, self._last = None, event
                self._decided[0 if event.accepted else 1] += 1
            case StackChanged(cells):
                self._cells = cells
                self._num_layers = sum(cells)
            case MemoryPlanned(needs, budgets, _):
                self._finished.append(needs_table(needs, budgets))
            case WarningRaised(text):
                self._finished.append(Text(f"warning: {said(text)}", "yellow"))

    def _finish_phase(self) -> None:
        if self._phase is not None:
            self._finished.append(self._phase_line(done=True))
            self._phase = None

    def __rich__(self) -> Group:
        lines = list(self._finished)
        if self._phase is not None:
            lines.append(self._phase_line(done=False))
        if self._cells:
            lines.append(self._stack_line())
        if self._phase == "search":
            lines.append(self._candidate_line())
        return Group(*lines)

    def _phase_line(self, done: bool) -> Text:
        elapsed = time.perf_counter() - self._started
        line = Text(f"{self._phase:<11}", "bold")
        if self._total:
            filled = _BAR_CELLS if done else min(_BAR_CELLS * self._steps // self._total, _BAR_CELLS)
            full, empty = ("█", "░") if self._unicode else ("#", ".")
            line.append(full * filled, "green").append(empty * (_BAR_CELLS - filled), "dim").append("  ")
        if not done and self._layer is not None:
            line.append(f"layer {self._layer[0] + 1}/{self._layer[1]}  ")
        rate = f"{self._bytes / elapsed / 1e9:.2f} GB/s" if elapsed > 0 else ""
        return line.append(f"{format_bytes(self._bytes)}  {rate}  {format_seconds(elapsed)}", "dim")

    def _stack_line(self) -> Text:
        tested = range(0)
        if self._candidate is not None:
            tested = range(self._candidate.pointer - 1, self._candidate.pointer + self._candidate.merged)
        line = Text(f"{'stack':<11}", "bold").append(strip(self._cells, tested, self._unicode))
        return line.append(f"  {self._num_layers} -> {len(self._cells)} layers", "dim")

    def _candidate_line(self) -> Text:
        line = Text(" " * 11)
        if self._last is not None:
            last, limit = self._last, self._threshold
            if last.similarity is None:
                line.append(f"layer {last.pointer - 1}: skipped", "red")
            elif last.accepted:
                above = "" if limit is None else f" > T = {limit:g}"
                line.append(f"layer {last.pointer - 1}: {last.similarity:.4f}{above}, merged", "green")
            else:
                below = "" if limit is None else f" <= T = {limit:g}"
                line.append(f"layer {last.pointer - 1}: {last.similarity:.4f}{below}, rejected", "red")
            line.append(f"  {self._decided[0]} of {sum(self._decided)} merged", "dim")
        if self._candidate is not None:
            layer = f"layer {self._candidate.pointer - 1}"
            line.append(f"  next: {layer}" if self._last else layer)
        return line
