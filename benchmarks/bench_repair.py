"""What does a repair give back of what a cut takes, and what does it cost?

Question   By how much does the loss on text rise that neither search nor repair has seen, with layers cut out, and
           after each kind of repair; in what time and memory?
Ceiling    No rise.
Wanted     At 25 % of the layers at least 45 % of the rise taken back, on each kind of text, within 3 minutes on two
           cores at 135M and 270M parameters and 15 at 1.5B.
Method     A model of real_models.py, cut as the default search, or another ``--setting``, of a result file of
           bench_real.py cut it (``--cuts``), or by block influence. Each repair is a run of ``streamcollapse apply`` of
           its own, on the text that ships, or another; its time is that of its phases, beside what the dry run
           says, its memory the peak of the process. The rise is in nats over the original's loss, on three kinds of
           text (real_models.held_out), in windows of 512 tokens spread evenly over each; no text that fits judges.

    python benchmarks/bench_repair.py (--model NAME --models DIR | --model bundled) --save FILE [--cuts FILE]
                                      [--setting NAME] [--shares 0.1 0.25 ...] [--methods linear auto ...]
                                      [--tokens 4096] [--repair-tokens 40000] [--repair-text FILE] [--threads N]
                                      [--note TEXT]
    python benchmarks/bench_repair.py --table FILE...

The rows of a size are in FILE as soon as they are known, and a run with a FILE that is there goes on. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from real_runs import CUTS, add_row, command, cost, cut, mean, opened, options, scored, shares, taken_back
from real_settings import sizes

from streamcollapse import Plan
from streamcollapse.run.opened import Job
from streamcollapse.run.refits import use_plan
from streamcollapse.settings.run import REPAIRS

PHASES = ("repair", "end to end", "repair check")
METHODS = [name for name in REPAIRS if name != "none"]
OPTIONS: dict[str, dict[str, Any]] = {
    "--setting": {"default": CUTS, "help": "whose rows of --cuts"},
    "--shares": {"nargs": "+", "type": float, "default": [0.25]},
    "--methods": {"nargs": "+", "choices": METHODS, "default": METHODS, "metavar": "METHOD"},
    "--repair-tokens": {"type": int, "default": 40_000},
    "--repair-text": {"type": Path, "metavar": "FILE", "help": "instead of what ships"},
}


def repaired(
    source: Path, plan: Plan, method: str, given: argparse.Namespace, place: Path
) -> tuple[Plan, dict[str, Any]]:
    """``plan`` after ``method``, and what that took: a run of the command of its own, in ``place``."""
    plan.save(place / "cut.json")
    asked: list[str | Path] = ["apply", source, place / "cut.json", "--out", place / "out", "--repair", method]
    asked += ["--repair-tokens", f"{given.repair_tokens}"]
    asked += [] if given.repair_text is None else ["--repair-text", given.repair_text]
    expected = command([*asked, "--dry-run"], given.threads)["expected_seconds"]
    what = cost(command(asked, given.threads)["usage"], *PHASES)
    what |= {"expected_seconds": sum(expected[name] for name in PHASES if name in expected)}
    found = Plan.load(place / "out")
    assert found.repair is not None
    return found, what | {"repair": found.repair.to_json()}


def measure(job: Job, source: Path, layers: int, given: argparse.Namespace, document: dict[str, Any]) -> None:
    """The rows of one size that ``document`` lacks."""
    known = [row["method"] for row in document["rows"] if row["layers"] == layers]
    if not (lacking := [method for method in given.methods if method not in known]):
        return
    plan = cut(job, source, layers, given.cuts, given.setting)
    with tempfile.TemporaryDirectory() as folder:
        plans, costs = [plan], list[dict[str, Any]]()
        for method in lacking:
            place = Path(folder) / method
            place.mkdir()
            found, took = repaired(source, plan, method, given, place)
            use_plan(job, found)
            plans, costs = [*plans, found], [*costs, took]
            print(f"{layers} layers, {method}: {took['seconds']:.0f} s", flush=True)
        document["dense"], (before, *after) = scored(job, plans, given.tokens, Path(folder))
    for method, took, rise in zip(lacking, costs, after, strict=True):
        back = taken_back(before, rise)
        row = {"layers": layers, "method": method, "cut": before, "rise": rise, "back": back, **took}
        add_row(document, row, given.save)
        print(f"{layers} layers, {method}: taken back {shares(back)} ({', '.join(back)})", flush=True)


def table(documents: list[dict[str, Any]]) -> str:
    """In Markdown: a row for each size, a column for each repair."""
    lines = list[str]()
    for document in documents:
        methods = list(dict.fromkeys(row["method"] for row in document["rows"]))
        lines += [f"**{document['model']}**, {document['num_layers']} layers", ""]
        lines += ["| layers that stay | cut alone | " + " | ".join(methods) + " |", "|---" * (2 + len(methods)) + "|"]
        for layers in dict.fromkeys(row["layers"] for row in document["rows"]):
            found = {row["method"]: row for row in document["rows"] if row["layers"] == layers}
            cells = [f"{layers}", f"{mean(next(iter(found.values()))['cut']):.3f}"]
            for row in map(found.get, methods):
                said = "" if row is None else f"{mean(row['rise']):.3f} ({shares(row['back'])}), {row['seconds']:.0f} s"
                cells.append(said)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    given = options(__doc__, OPTIONS)
    if given.table:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in given.table]))
        return
    print(__doc__.split("\n\n")[1])
    said = {"repair_tokens": given.repair_tokens, "cut": given.setting if given.cuts else "block-influence"}
    source, job, document = opened("repair", given, **said)
    for layers in sizes(job.num_layers, tuple(given.shares)):
        measure(job, source, layers, given, document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
