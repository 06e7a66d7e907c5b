"""Healing as text for people: what it would do, and what it brought."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from streamcollapse.cli.screen import memory_shown
from streamcollapse.cli.status import expected_words
from streamcollapse.cli.tables import verdict_rows, work_rows
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.units import format_bytes

if TYPE_CHECKING:  # for their names alone: importing them takes seconds
    from streamcollapse.jobs.apply import Pruned
    from streamcollapse.jobs.prepare_heal import PreparedHealing

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40  # columns of a curve


def show_prepared(prepared: PreparedHealing, verbose: bool = False) -> None:
    """What a dry run found: nothing was written."""
    console, lessons = plain_console(), prepared.lessons
    plan, course, schedule = lessons.memory, lessons.course, lessons.schedule
    needs = [(need.phase, need.what, need.num_bytes, need.memory) for need in plan.needs]
    console.print(memory_shown(needs, plan.budgets, verbose))
    tokens, held_out = lessons.text.tokens
    whole = prepared.job.checkpoint.num_parameters
    rows: list[tuple[str, str | Text]] = [
        ("teacher", f"{lessons.teacher.name}, {lessons.teacher.num_layers} layers"),
        ("pruned", f"{prepared.job.name}, {prepared.job.num_layers} layers"),
        ("trained", f"{course.trained:,} numbers ({100 * course.trained / whole:.1f} % of the model's)"),
        ("text", f"{lessons.text.name}: {tokens} tokens, and {held_out} held out"),
        ("steps", f"{schedule.steps} of {course.tokens} tokens, judged every {schedule.every}"),
        ("disk", f"{format_bytes(prepared.disk)} on the way, the result included"),
        *([("time", expected_words(prepared.expected))] if prepared.expected is not None else []),
        ("computes on", " in ".join(prepared.job.compute().values())),
        ("dry run", "everything checks out; nothing was written"),
    ]
    console.print()
    console.print(lines_of(rows))


def show_healed(healed: Pruned) -> None:
    """The outcome of ``heal``."""
    report, record = healed.report, healed.plan.heal
    assert record is not None
    course = report["healing"]
    rows: list[tuple[str, str | Text]] = [
        ("healed", record.in_words()),
        ("steps", f"{curve(course['losses'])}  {course['losses'][0]:.4f} -> {course['losses'][-1]:.4f}"),
        ("held out", ", ".join(f"{step}: {loss:.4f}" for step, loss in course["judged"].items())),
        *work_rows(report),
    ]
    if judgement := report.get("held_out"):
        rows += verdict_rows(judgement)
        before, unhealed, after = judgement["loss"]["before"], course.get("unhealed"), judgement["loss"]["after"]
        if unhealed is not None and after is not None and unhealed > before:
            back = (unhealed - after) / (unhealed - before)
            rows.append(("", f"beside the teacher; {100 * back:.0f} % of what pruning cost ({unhealed:.3f}) is back"))
    rows.append(("healed model", str(healed.out)))
    plain_console().print(lines_of(rows))


def curve(values: list[float]) -> str:
    """The course of ``values`` in a line of bars."""
    columns = min(len(values), _WIDTH)
    means = [
        sum(part) / len(part)
        for n in range(columns)
        if (part := values[n * len(values) // columns : (n + 1) * len(values) // columns])
    ]
    low, high = min(means), max(means)
    return "".join(_BARS[round((value - low) / (high - low or 1.0) * (len(_BARS) - 1))] for value in means)
