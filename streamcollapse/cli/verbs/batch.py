"""The verb batch: many checkpoints, what each worker is at, and a table in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import print_json, steps_bar
from streamcollapse.cli.text import plain_console, said, table_of
from streamcollapse.errors import printable
from streamcollapse.progress import DecisionMade, LayerDone, PhaseStarted, StepDone
from streamcollapse.settings.run import Cluster, RunSettings
from streamcollapse.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from streamcollapse.batches.run import BatchResult
    from streamcollapse.batches.worker import Message, Outcome

JobsFile = Annotated[Path, typer.Argument(readable=False, metavar="JOBS", help="YAML file: sources and settings.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        readable=False,
        metavar="DIR",
        help="Directory for the results.",
        show_default="what JOBS says under out",
    ),
]


# the others differ from job to job, and are said in the file
_SETTINGS = ("device", "prefetch", "io", "ram_budget", "vram_budget", "work_dir", "trust_remote_code")


@o.grouped
def batch(
    jobs: JobsFile,
    cluster: Cluster,
    settings: Annotated[RunSettings, o.Only(_SETTINGS)],
    out: Out = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Prune and convert many checkpoints: every source in JOBS with each of its settings. What is finished already is
    left as it is. Budgets are those of one worker."""
    from streamcollapse.batches.spec import read_jobs

    read_jobs(jobs)  # a mistake in it is told before seconds go into imports
    from streamcollapse.batches import run as batches

    if dry_run:
        found = batches.preview(jobs, out, settings=settings)
    else:
        with _progress(quiet=as_json) as listener:
            found = batches.batch(jobs, out, cluster=cluster, settings=settings, listener=listener)
    print_json(found.report) if as_json else _show(found)
    if found.num_failed:
        raise typer.Exit(1)


_STYLES = {"done": "green", "kept": "dim", "ready": "green", "failed": "red"}


def _figures(outcome: Outcome) -> str:
    """What came out, in a few words."""
    if outcome.error is not None:
        return outcome.error
    figures = outcome.figures or {}
    parts = []
    if "layers" in figures:
        parts.append(f"{figures['layers']['before']} -> {figures['layers']['after']} layers")
        parts.append(f"{100 * figures['ratio']:.1f} % of the parameters removed")
    if "bytes" in figures:
        parts.append(f"{format_bytes(figures['bytes']['before'])} -> {format_bytes(figures['bytes']['after'])}")
    return ", ".join(parts)


def _line(outcome: Outcome) -> Text:
    line = Text(f"{outcome.status:<7}", _STYLES.get(outcome.status, ""))
    line.append(printable(outcome.name), "bold").append(f"  {said(_figures(outcome))}")
    if outcome.seconds:
        line.append(f"  {format_seconds(outcome.seconds)}", "dim")
    if outcome.attempts > 1:
        line.append(f"  at attempt {outcome.attempts}", "yellow")
    return line


def _show(found: BatchResult) -> None:
    """The summary: a line for each task, and where everything is."""
    console = plain_console()
    table = table_of(("", "result", "layers", "removed", "time"), right=2)
    table.show_header = any(one.figures for one in found.outcomes)
    failed: dict[str, list[str]] = {}
    for outcome in found.outcomes:
        figures = outcome.figures or {}
        layers = f"{figures['layers']['before']} -> {figures['layers']['after']}" if "layers" in figures else ""
        removed = f"{100 * figures['ratio']:.1f} %" if "ratio" in figures else ""
        seconds = format_seconds(outcome.seconds) if outcome.seconds else ""
        status = Text(outcome.status, _STYLES.get(outcome.status, ""))
        table.add_row(status, printable(outcome.name), layers, removed, seconds)
        if outcome.error is not None:
            failed.setdefault(outcome.error, []).append(outcome.name)
    console.print(table)
    for error, names in failed.items():  # a source that cannot be used fails with each of its settings
        which = printable(names[0]) if len(names) == 1 else f"{printable(names[0])} and {len(names) - 1} more"
        console.print(Text(f"\n{which}: ", "bold").append(said(error), "not bold red"))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(found.report["counts"].items()))
    console.print(f"\n{counts}; results in {printable(found.out)}")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Message], None]]:
    """A listener that shows what each worker is at, or on no terminal a line for each result; on stderr."""
    if quiet:
        yield lambda message: None
        return
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    view = _View(console)
    if not console.is_terminal:
        yield view.listen
        return
    with Live(view, console=console, refresh_per_second=8, transient=True):
        yield view.listen


class _View:
    """What is running: which phase, how far, since when."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = steps_bar(TextColumn("{task.fields[phase]}"), TimeElapsedColumn())
        self._ids: dict[str, TaskID] = {}

    def listen(self, message: Message) -> None:
        from streamcollapse.batches.worker import JobEnded, JobEvent, JobStarted

        match message:
            case JobStarted(name, _):
                self._ids[name] = self._bars.add_task(printable(name), total=None, phase="")
            case JobEnded(outcome):
                if outcome.name in self._ids:
                    self._bars.remove_task(self._ids.pop(outcome.name))
                self._console.print(_line(outcome))
            case JobEvent(name, PhaseStarted(phase, total)) if name in self._ids:
                self._bars.update(self._ids[name], completed=0, phase=phase)
                self._bars.tasks[self._bars.task_ids.index(self._ids[name])].total = total
            case JobEvent(name, LayerDone() | StepDone() | DecisionMade()) if name in self._ids:
                self._bars.advance(self._ids[name])

    def __rich__(self) -> Progress:
        return self._bars
