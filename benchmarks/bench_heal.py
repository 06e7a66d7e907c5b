"""What does healing give back of what a cut takes, beside and after a repair, and what does it cost?

Question   By how much does the loss rise on text that neither search nor repair nor healing has seen, with layers cut
           out, and after a repair, healing, or both; in what time and memory, with how much read?
Ceiling    No rise.
Wanted     At 25 % of the layers repair and healing take back at least 65 % of the rise, on each kind of text, with at
           most a million tokens.
Method     A model of real_models.py, cut as the default search of a result file of bench_real.py cut it (``--cuts``),
           or by block influence. Repair is ``streamcollapse apply --repair auto``, healing ``streamcollapse heal``, on
           the text that ships or ``--text``, each a process of its own. Judged as bench_repair.py judges.

    python benchmarks/bench_heal.py (--model NAME --models DIR | --model bundled) --save FILE [--cuts FILE]
                                    [--share 0.25] [--ways heal repair+heal ...] [--heal-tokens 60000]
                                    [--text PATTERN] [--options "--rounds 2 --rate 5e-4"] [--threads N] [--note TEXT]
    python benchmarks/bench_heal.py --table FILE...

Each row is in FILE as soon as it is known, and a run with a FILE that is there goes on. The last line of stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

from real_runs import add_row, command, cost, cut, mean, opened, options, scored, shares, taken_back
from real_settings import sizes

from streamcollapse import Plan, compose_plans
from streamcollapse.run.opened import Job
from streamcollapse.run.refits import use_plan

WAYS = ("heal", "repair+heal")
REPAIR = ("repair", "end to end", "repair check")  # its phases
OPTIONS: dict[str, dict[str, Any]] = {
    "--share": {"type": float, "default": 0.25},
    "--ways": {"nargs": "+", "choices": WAYS, "default": WAYS, "metavar": "WAY"},
    "--heal-tokens": {"type": int, "default": 60_000},
    "--text": {"help": "that is healed on"},
    "--options": {"default": "", "help": "more of heal's"},
}


def healed(
    source: Path, plan: Plan, way: str, given: argparse.Namespace, place: Path
) -> tuple[list[Plan], dict[str, Any]]:
    """The plans of ``source`` after the repair, if ``way`` has one, and after healing; and what each took."""
    plan.save(place / "cut.json")
    pruned, costs, plans = place / "pruned", dict[str, Any](), list[Plan]()
    repair: list[str | Path] = ["--repair", "auto"] if way == "repair+heal" else []
    said = command(["apply", source, place / "cut.json", "--out", pruned, *repair], given.threads)
    if repair:
        costs["repair"], plans = cost(said["usage"], *REPAIR), [Plan.load(pruned)]
    asked: list[str | Path] = ["heal", pruned, "--teacher", source, "--out", place / "healed"]
    asked += ["--tokens", f"{given.heal_tokens}", *(["--text", given.text] if given.text else [])]
    said = command([*asked, *shlex.split(given.options)], given.threads)
    costs["heal"] = cost(said["usage"], "teacher", "heal")
    found = Plan.load(place / "healed")
    assert found.heal is not None
    costs["record"], costs["course"] = found.heal.to_json(), said["healing"]
    together = compose_plans(pruned / "streamcollapse_plan.json", place / "healed" / "streamcollapse_plan.json")
    return [*plans, together], costs


def measure(job: Job, source: Path, layers: int, given: argparse.Namespace, document: dict[str, Any]) -> None:
    """The rows of one size that ``document`` lacks."""
    plan = cut(job, source, layers, given.cuts)
    asked = {"layers": layers, "heal_tokens": given.heal_tokens, "text": given.text, "options": given.options}
    for way in given.ways:
        named = {**asked, "way": way}
        if any(all(row[key] == value for key, value in named.items()) for row in document["rows"]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            plans, costs = healed(source, plan, way, given, Path(folder))
            for one in plans:
                use_plan(job, one)
            document["dense"], (before, *after) = scored(job, [plan, *plans], given.tokens, Path(folder))
        row = {**named, "cut": before, "rise": after[-1], "back": taken_back(before, after[-1]), **costs}
        if len(after) > 1:
            row["repaired"] = {"rise": after[0], "back": taken_back(before, after[0])}
        add_row(document, row, given.save)
        minutes = costs["heal"]["seconds"] / 60
        print(f"{layers} layers, {way}, {minutes:.0f} min: taken back {shares(row['back'])}", flush=True)


def table(documents: list[dict[str, Any]]) -> str:
    """In Markdown: a row for each way."""
    lines = [
        "| model | layers | way | tokens | options | rise: cut -> healed | taken back | minutes | peak |",
        "|---" * 9 + "|",
    ]
    for document in documents:
        for row in document["rows"]:
            seconds = row["heal"]["seconds"] + row.get("repair", {"seconds": 0.0})["seconds"]
            cells = [document["model"], f"{document['num_layers']} -> {row['layers']}", row["way"]]
            cells += [f"{row['record']['tokens'] * row['record']['rounds']:,}", row["options"] or "none"]
            cells += [f"{mean(row['cut']):.3f} -> {mean(row['rise']):.3f}", shares(row["back"])]
            cells += [f"{seconds / 60:.0f}", f"{row['heal']['peak_rss'] / 1e9:.2f} GB"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    given = options(__doc__, OPTIONS)
    if given.table:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in given.table]))
        return
    print(__doc__.split("\n\n")[1])
    source, job, document = opened("heal", given)
    for layers in sizes(job.num_layers, (given.share,)):
        measure(job, source, layers, given, document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
