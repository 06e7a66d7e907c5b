"""The verb batch: many checkpoints, what each worker is at, and a table in the end."""

from __future__ import annotations

import math
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
from streamcollapse.units import format_about, format_bytes, format_seconds

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
    """Prune, convert or measure many checkpoints: every source in JOBS with each of its settings. What is finished
    already is left as it is. Budgets are those of one worker."""
    from streamcollapse.batches.spec import read_jobs

    count = len(read_jobs(jobs).tasks)  # a mistake in it is told before seconds go into imports
    with _progress(count, quiet=as_json or dry_run) as listener:
        from streamcollapse.batches import run as batches  # importing torch takes seconds; the screen is there already

        if dry_run:
            found = batches.preview(jobs, out, settings=settings)
        else:
            found = batches.batch(jobs, out, cluster=cluster, settings=settings, listener=listener)
    print_json(found.report) if as_json else _show(found)
    if found.num_failed:
        raise typer.Exit(1)


_COLUMNS = ("layers", "removed", "size", "memory", "loss", "perplexity", "verdict", "time")


def _row(outcome: Outcome) -> dict[str, str | Text]:
    """What the table says of a result, or of what a job that is ready will come to, by column."""
    figures, row = outcome.figures or {}, dict[str, str | Text]()
    if "layers" in figures:
        row["layers"] = f"{figures['layers']['before']} -> {figures['layers']['after']}"
    if "ratio" in figures:
        row["removed"] = f"{100 * figures['ratio']:.1f} %"
    if "bytes" in figures:
        row["size"] = format_bytes(figures["bytes"]["after"])
    kinds = {"": figures.get("ram") or figures.get("peak_rss"), " GPU": figures.get("vram") or figures.get("peak_vram")}
    if memory := ", ".join(f"{format_bytes(count)}{kind}" for kind, count in kinds.items() if count):
        row["memory"] = memory
    if judgement := figures.get("held_out"):
        rise, after = judgement["rise"], judgement["perplexity"]["after"]
        broken = judgement["verdict"].startswith("broken")
        row["loss"] = "infinite" if rise is None else f"{rise:+.3f}"
        row["perplexity"] = "infinite" if after is None else f"{after:.4g}"
        row["verdict"] = Text(judgement["verdict"], "bold red" if broken else "")
    if "perplexity" in figures:
        row["loss"], row["perplexity"] = f"{figures['loss']:.3f}", f"{figures['perplexity'] or math.inf:.4g}"
    if seconds := figures.get("seconds"):
        row["time"] = format_about(seconds)
    elif outcome.seconds:
        row["time"] = format_seconds(outcome.seconds)
    return row


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
    if judgement := figures.get("held_out"):
        parts.append(judgement["verdict"])
    if "perplexity" in figures:
        parts.append(f"perplexity {figures['perplexity'] or math.inf:.4g}")
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
    rows = [_row(outcome) for outcome in found.outcomes]
    shown = [name for name in _COLUMNS if any(name in row for row in rows)]
    table = table_of(("", "result", *shown), right=2)
    table.show_header = bool(shown)
    failed: dict[str, list[str]] = {}
    for outcome, row in zip(found.outcomes, rows, strict=True):
        status = Text(outcome.status, _STYLES.get(outcome.status, ""))
        table.add_row(status, printable(outcome.name), *(row.get(name, "") for name in shown))
        if outcome.error is not None:
            failed.setdefault(outcome.error, []).append(outcome.name)
    console.print(table)
    for error, names in failed.items():  # a source that cannot be used fails with each of its settings
        which = printable(names[0]) if len(names) == 1 else f"{printable(names[0])} and {len(names) - 1} more"
        console.print(Text(f"\n{which}: ", "bold").append(said(error), "not bold red"))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(found.report["counts"].items()))
    console.print(f"\n{counts}; results in {printable(found.out)}")


@contextmanager
def _progress(count: int, quiet: bool) -> Iterator[Callable[[Message], None]]:
    """A listener that shows how many of ``count`` jobs are done and what each worker is at, or on no terminal a line
    for each result; on stderr."""
    if quiet:
        yield lambda message: None
        return
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    view = _View(console, count)
    if not console.is_terminal:
        yield view.listen
        return
    with Live(view, console=console, refresh_per_second=8, transient=True):
        yield view.listen


class _View:
    """What is running: which phase, how far, since when."""

    def __init__(self, console: Console, count: int) -> None:
        self._console = console
        self._bars = steps_bar(TextColumn("{task.fields[phase]}"), TimeElapsedColumn())
        self._all = self._bars.add_task("jobs", total=count, phase=f"0 of {count} done; starting workers")
        self._count, self._done, self._begun = count, 0, 0
        self._ids: dict[str, TaskID] = {}

    def listen(self, message: Message) -> None:
        from streamcollapse.batches.worker import JobEnded, JobEvent, JobStarted

        match message:
            case JobStarted(name, _):
                self._bars.update(self._all, phase=f"{self._done} of {self._count} done")
                self._ids[name] = self._bars.add_task(printable(name), total=None, phase="")
                if not self._console.is_terminal:
                    self._console.print(Text("started ").append(printable(name), "bold").append(self._of_all()))
            case JobEnded(outcome):
                if outcome.name in self._ids:
                    self._bars.remove_task(self._ids.pop(outcome.name))
                self._done += 1
                self._bars.update(self._all, completed=self._done, phase=f"{self._done} of {self._count} done")
                self._console.print(_line(outcome))
            case JobEvent(name, PhaseStarted(phase, total)) if name in self._ids:
                self._bars.update(self._ids[name], completed=0, phase=phase)
                self._bars.tasks[self._bars.task_ids.index(self._ids[name])].total = total
            case JobEvent(name, LayerDone() | StepDone() | DecisionMade()) if name in self._ids:
                self._bars.advance(self._ids[name])

    def _of_all(self) -> str:
        self._begun += 1
        return f"  {self._begun} of {self._count}" if self._begun <= self._count else "  again"

    def __rich__(self) -> Progress:
        return self._bars
