"""What gpu_day.py has found, as a JSON document and as a Markdown table, written anew after every row."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_runner import Outcome

_BAD = ("MISSED", "FAILED", "DIED", "KILLED", "NO TIME", "NOT RUN")  # the last five as rows end, in capitals


@dataclass
class Results:
    """The outcomes of a ``part``, or of several, kept in the directory ``out``. ``header``: lines on the machine;
    ``environment``: the same as figures."""

    out: Path
    part: str
    rehearsal: bool
    header: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def table(self) -> Path:
        """The Markdown file."""
        return self.out / f"gpu-day-part{self.part}.md"

    def add(self, outcome: Outcome) -> None:
        """One more row, kept at once."""
        self.outcomes.append(outcome)
        self.save()

    def save(self) -> None:
        """Write both files, each whole or not at all."""
        texts = {".json": json.dumps(self._document(), indent=1) + "\n", ".md": self._markdown()}
        for suffix, text in texts.items():
            new = self.table.with_suffix(f"{suffix}.new")
            new.write_text(text, "utf-8")
            new.replace(self.table.with_suffix(suffix))

    def good(self) -> bool:
        """Whether every row was measured and nothing wanted was missed."""
        return not any(self.verdict(outcome) in _BAD for outcome in self.outcomes)

    def verdict(self, outcome: Outcome) -> str:
        """In a word; empty where nothing was wanted."""
        found = outcome.finding
        if found is None:
            return outcome.ended.upper()
        fast = None if self.rehearsal else found.fast
        wanted = [value for value in (found.holds, fast) if value is not None]
        if not wanted:
            return "" if found.fast is None else "not judged"
        return "met" if all(wanted) else "MISSED"

    def line(self, outcome: Outcome) -> str:
        """What a screen shows of a row."""
        row, verdict = outcome.row, self.verdict(outcome) or "-"
        wanted = f" [wanted: {row.wanted}]" if row.wanted else ""
        below = textwrap.fill(told(outcome) + wanted, 120, initial_indent=" " * 4, subsequent_indent=" " * 4)
        return f"{row.name:<18}{outcome.seconds:6.1f} s  {verdict:<10}  {row.question}\n{below}"

    def summary(self) -> str:
        """How many rows came to what."""
        words = [self.verdict(outcome) or "with nothing wanted" for outcome in self.outcomes]
        ways = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        return f"part {self.part} in {sum(o.seconds for o in self.outcomes):.0f} s: {ways or 'no row'}"

    def _document(self) -> dict[str, Any]:
        rows = [
            {
                "row": outcome.row.name,
                "question": outcome.row.question,
                "wanted": outcome.row.wanted,
                "verdict": self.verdict(outcome),
                "ended": outcome.ended,
                "measured": None if outcome.finding is None else outcome.finding.measured,
                "figures": outcome.notes if outcome.finding is None else outcome.finding.figures,
                "seconds": round(outcome.seconds, 3),
                "error": explained(outcome) or outcome.error or None,
            }
            for outcome in self.outcomes
        ]
        return {
            "benchmark": "gpu_day",
            "part": self.part,
            "rehearsal": self.rehearsal,
            "date": datetime.now(UTC).date().isoformat(),
            "environment": self.environment,
            "rows": rows,
        }

    def _markdown(self) -> str:
        title = f"# GPU day, part {self.part}" + (": a rehearsal on a CPU, whose figures say nothing" * self.rehearsal)
        lines = [title, "", *(f"- {line}" for line in self.header), ""]
        lines += ["| row | question | measured | wanted | met | seconds |", "|---|---|---|---|---|---|"]
        for outcome in self.outcomes:
            row = outcome.row
            cells = (row.name, row.question, told(outcome), row.wanted, self.verdict(outcome))
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + f" | {outcome.seconds:.1f} |")
        lines += ["", self.summary(), ""]
        for outcome in self.outcomes:
            if text := explained(outcome):
                lines += [f"## {outcome.row.name}", "", "```", text.replace("```", "'''"), "```", ""]
        return "\n".join(lines)


def told(outcome: Outcome) -> str:
    """What was measured, or in one line why not."""
    if outcome.finding is not None:
        return outcome.finding.measured
    lines = [line.strip() for line in outcome.error.splitlines() if line.strip()] or ["no reason was given"]
    notes = ", ".join(f"{key} {value}" for key, value in outcome.notes.items())
    return (lines[-1] if outcome.ended == "failed" else lines[0]) + (f"; until then: {notes}" if notes else "")


def explained(outcome: Outcome) -> str:
    """What a program said that shows why: the end of a traceback, or of its output."""
    if outcome.finding is not None:
        return outcome.finding.output
    return outcome.error if outcome.ended in ("failed", "died", "killed") else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
