"""What the runs of bench_prune.py come to: medians, targets met or missed, decisions compared. Numbers only."""

from __future__ import annotations

import statistics
from typing import Any

from make_checkpoint import SHAPES
from peers import APPLY, OURS, PASSES

COPY = "copy"
Runs = dict[str, list[dict[str, Any]]]  # per program, its runs as bench_prune.one_run gives them


def medians(runs: Runs) -> dict[str, dict[str, float]]:
    """Per program: seconds of the job and of its parts together, peaks, ``pass`` (the first
    of a process), ``later pass``, and ``write`` with its flush."""
    found: dict[str, dict[str, float]] = {}
    for name, done in runs.items():
        rows = []
        for one in done:
            parts = one["parts"]
            row = {key: one.get(key) for key in ("job_seconds", "peak_rss", "peak_anonymous_rss")}
            row["parts_seconds"] = sum(parts.values())
            row["pass"] = parts.get("pass")
            row["later pass"] = statistics.median(later) if (later := one.get("passes", [])[1:]) else None
            row["write"] = parts["write"] + parts.get("flush", 0.0) if "write" in parts else None
            rows.append({key: value for key, value in row.items() if value is not None})
        if rows:
            found[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return found


def judged(median: dict[str, dict[str, float]], shape: str, layers: int) -> list[dict[str, Any]]:
    """Each target: ``found`` times better than the other, ``wanted`` times; ``met`` is None where it is not stated."""
    memory = "peak_anonymous_rss" if "peak_anonymous_rss" in median[OURS] else "peak_rss"
    complete = shape == "tinyllama-1.1b" and layers == SHAPES[shape].layers
    stated = {"at_1.1b": complete, "from_1.1b": shape not in ("tiny", "smollm2", "gemma3"), "never": False}
    rows = [
        ("job: times faster than the authors' procedure", OURS, "authors", "parts_seconds", 10.0, "at_1.1b"),
        ("whole process, with Python's start: times faster", OURS, "authors", "job_seconds", None, "never"),
        ("job: times less memory than the authors' procedure", OURS, "authors", memory, 5.0, "at_1.1b"),
        ("pass: times faster than accelerate's disk offload", PASSES, "accelerate", "later pass", 1.5, "from_1.1b"),
        ("first pass of a process: times faster", PASSES, "accelerate", "pass", None, "never"),
        ("pass: times faster than AirLLM", PASSES, "airllm", "later pass", None, "never"),
        ("write: times as fast as mergekit", APPLY, "mergekit", "write", 1.0, "from_1.1b"),
        ("write: times as fast as a plain copy", APPLY, COPY, "write", 1 / 1.25, "from_1.1b"),
    ]
    targets = []
    for what, mine, name, key, wanted, where in rows:
        if mine in median and name in median:
            found = median[name][key] / median[mine][key]
            met = found >= wanted if stated[where] and wanted is not None else None
            targets.append({"target": what, "wanted": wanted, "found": found, "met": met})
    return targets


def compared_decisions(runs: Runs) -> dict[str, Any] | None:
    """Whether every run of the authors' procedure decided as ours did, and how far similarities lie apart."""
    theirs = [one["decisions"] for one in runs.get("authors", [])]
    if not theirs:
        return None
    every = [*theirs, *(one["decisions"] for one in runs[OURS])]
    said = [[(d["l"], d["merged"], d["accepted"]) for d in decisions] for decisions in every]
    same = all(decisions == said[0] for decisions in said)
    pairs = [(a, b) for decisions in every for a, b in zip(decisions, every[0], strict=False)]
    apart = [abs(a["similarity"] - b["similarity"]) for a, b in pairs if None not in (a["similarity"], b["similarity"])]
    return {"same": same, "candidates": len(said[0]), "largest_difference": max(apart) if same and apart else None}
