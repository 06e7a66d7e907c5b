"""What does healing give back of what a cut takes, beside and after a repair, and what does it cost?

Question   By how much does the loss rise on text that neither search nor repair nor healing has seen, with layers cut
           out, and after a repair, healing, or both; in what time and memory, with how much read?
Ceiling    No rise.
Wanted     At 25 % of the layers repair and healing take back at least 65 % of the rise, on each kind of text, with at
           most a million tokens.
Method     A model of real_models.py, cut as ``greedy standard`` of a result file of bench_real.py cut it (``--cuts``),
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
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from about import environment
from bench_repair import cut, scored
from real_models import add_options, chosen_model
from real_settings import sizes

from streamcollapse import Plan, RunSettings, compose_plans
from streamcollapse.run.opened import Job, open_job
from streamcollapse.run.refits import use_plan
from streamcollapse.storage.disk import write_whole

WAYS = ("heal", "repair+heal")


def command(arguments: list[str], threads: int) -> dict[str, Any]:
    """What ``streamcollapse`` says with ``arguments`` and --json."""
    done = subprocess.run(
        [sys.executable, "-m", "streamcollapse", *arguments, "--no-verdict", "--json"],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cost(usage: dict[str, Any], *phases: str) -> dict[str, Any]:
    """Seconds and bytes read of ``phases``, and the peak of the process."""
    chosen = [phase for phase in usage["phases"] if phase["name"] in phases]
    return {
        "seconds": sum(phase["seconds"] for phase in chosen),
        "bytes_read": sum(phase["bytes_read"] for phase in chosen),
        "peak_rss": usage["peak_rss"],
    }


def healed(
    source: Path, plan: Plan, way: str, given: argparse.Namespace, place: Path
) -> tuple[list[Plan], dict[str, Any]]:
    """The plans of ``source`` after the repair, if ``way`` has one, and after healing; and what each took."""
    plan.save(place / "cut.json")
    pruned, costs, plans = place / "pruned", dict[str, Any](), list[Plan]()
    repair = ["--repair", "auto"] if way == "repair+heal" else []
    said = command(["apply", str(source), str(place / "cut.json"), "--out", str(pruned), *repair], given.threads)
    if repair:
        costs["repair"], plans = cost(said["usage"], "repair"), [Plan.load(pruned)]
    asked = ["heal", str(pruned), "--teacher", str(source), "--out", str(place / "healed")]
    asked += ["--tokens", str(given.heal_tokens), *(["--text", given.text] if given.text else [])]
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
            document["dense"], losses = scored(job, [plan, *plans], given.tokens, Path(folder))
        rises = [{kind: nll - document["dense"][kind] for kind, nll in one.items()} for one in losses]
        back = [{kind: 1.0 - rise[kind] / rises[0][kind] for kind in rise} for rise in rises[1:]]
        row = {**named, "cut": rises[0], "rise": rises[-1], "back": back[-1], **costs}
        if len(back) > 1:
            row["repaired"] = {"rise": rises[1], "back": back[0]}
        document["rows"].append(row)
        write_whole(given.save, json.dumps(document, indent=1) + "\n")
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in back[-1].items())
        print(f"{layers} layers, {way}, {costs['heal']['seconds'] / 60:.0f} min: taken back {shares}", flush=True)


def table(documents: list[dict[str, Any]]) -> str:
    """In Markdown: a row for each way."""
    lines = [
        "| model | layers | way | tokens | options | rise: cut -> healed | taken back | minutes | peak |",
        "|---" * 9 + "|",
    ]
    for document in documents:
        for row in document["rows"]:
            shares = " / ".join(f"{100 * share:.0f}" for share in row["back"].values())
            seconds = row["heal"]["seconds"] + row.get("repair", {"seconds": 0.0})["seconds"]
            cells = [document["model"], f"{document['num_layers']} -> {row['layers']}", row["way"]]
            cells += [f"{row['record']['tokens'] * row['record']['rounds']:,}", row["options"] or "none"]
            cells += [f"{_mean(row['cut']):.3f} -> {_mean(row['rise']):.3f}", f"{shares} %"]
            cells += [f"{seconds / 60:.0f}", f"{row['heal']['peak_rss'] / 1e9:.2f} GB"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(by_kind: dict[str, float]) -> float:
    return sum(by_kind.values()) / len(by_kind)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "bundled")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--cuts", type=Path, help="results of bench_real.py of the same model")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text that judges")
    parser.add_argument("--heal-tokens", type=int, default=60_000)
    parser.add_argument("--text", help="that is healed on")
    parser.add_argument("--options", default="", help="more of heal's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--note", help="said in the results, such as what else the machine did")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE")
    given = parser.parse_args()
    if not given.table and given.save is None:
        parser.error("--save is missing")
    return given


def main() -> None:
    given = options()
    if given.table:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in given.table]))
        return
    print(__doc__.split("\n\n")[1])
    torch.set_num_threads(given.threads)
    source = chosen_model(given) or Path(str(resources.files("streamcollapse.data"))) / "wiki-llama-24l"
    job = open_job(source, RunSettings())
    head: dict[str, Any] = {"benchmark": "heal", "date": datetime.now(UTC).date().isoformat()}
    head |= {"environment": environment(given.threads), "note": given.note, "model": given.model}
    head |= {"num_layers": job.num_layers, "tokens": given.tokens}
    document = head | {"dense": {}, "rows": []}
    if given.save.exists():
        document |= json.loads(given.save.read_text(encoding="utf-8"))
    for layers in sizes(job.num_layers, (given.share,)):
        measure(job, source, layers, given, document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
