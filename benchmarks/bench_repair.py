"""What does a repair give back of what a cut takes, and what does it cost?

Question   By how much does the loss on text rise that neither search nor repair has seen, with layers cut out, and
           after each kind of repair; in what time and memory?
Ceiling    No rise.
Wanted     At 25 % of the layers at least 45 % of the rise taken back, on each kind of text, within 3 minutes on two
           cores at 135M and 270M parameters and 15 at 1.5B.
Method     A model of real_models.py, cut as the default search, or another ``--setting``, of a result file of
           bench_real.py cut it (``--cuts``), or by block influence. Each repair is a run of ``streamcollapse apply`` of
           its own, on the text that ships, or another; its time is that of its phases, its memory the peak of the
           process. The rise is in nats over the original's loss, on three kinds of text (real_models.held_out), in
           windows of 512 tokens spread evenly over each; no text that fits judges.

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
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from about import environment
from real_models import add_options, chosen_model, held_out
from real_search import stack_of
from real_settings import sizes

from streamcollapse import Plan, RunSettings, SearchOptions, Streaming, search
from streamcollapse.run.held_out import held_out_perplexities, held_out_text
from streamcollapse.run.opened import Job, open_job
from streamcollapse.run.refits import use_plan
from streamcollapse.settings.run import REPAIRS
from streamcollapse.storage.disk import write_whole

PHASES = ("repair", "end to end", "repair check")
CUTS = "greedy standard, exchanges"  # the rows of a result file of bench_real.py, found as the default finds them


def cut(job: Job, source: Path, layers: int, cuts: Path | None, setting: str = CUTS) -> Plan:
    """The plan of ``layers`` layers, without a repair: the row of ``setting`` in ``cuts``."""
    if cuts is None:
        return search(source, SearchOptions(strategy="block-influence", target_layers=layers))
    rows = json.loads(cuts.read_text(encoding="utf-8"))["rows"]
    row = next(row for row in rows if (row["setting"], row["layers"]) == (setting, layers))
    return Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), stack_of(row["plan"]))


def repaired(
    source: Path, plan: Plan, method: str, given: argparse.Namespace, place: Path
) -> tuple[Plan, dict[str, Any]]:
    """``plan`` after ``method``, and what that took: a run of the command of its own, in ``place``."""
    tokens, threads = given.repair_tokens, given.threads
    plan.save(place / "cut.json")
    command = [sys.executable, "-m", "streamcollapse", "apply", str(source), str(place / "cut.json")]
    more = ["--out", str(place / "out"), "--repair", method, "--repair-tokens", str(tokens), "--no-verdict", "--json"]
    more += [] if given.repair_text is None else ["--repair-text", str(given.repair_text)]
    done = subprocess.run(
        [*command, *more],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    usage = json.loads(done.stdout.splitlines()[-1])["usage"]
    phases = {phase["name"]: phase for phase in usage["phases"]}
    each = {name: phases[name]["seconds"] for name in PHASES if name in phases}
    num_bytes = sum(phases[name]["bytes_read"] for name in PHASES if name in phases)
    found = Plan.load(place / "out")
    assert found.repair is not None
    what = {"seconds": sum(each.values()), "phases": each, "peak_rss": usage["peak_rss"], "bytes_read": num_bytes}
    return found, what | {"repair": found.repair.to_json()}


def scored(job: Job, plans: list[Plan], tokens: int, folder: Path) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The original's loss on each kind of text, and that of each of ``plans``."""
    dense: dict[str, float] = {}
    found: list[dict[str, float]] = [{} for _ in plans]
    for kind, contents in held_out().items():
        file = folder / f"{kind}.txt"
        file.write_text(contents, encoding="utf-8")
        before, *after = held_out_perplexities(job, held_out_text(job, file, tokens), plans, Streaming())
        dense[kind] = before.nll
        for one, result in zip(found, after, strict=True):
            one[kind] = result.nll
    return dense, found


def measure(job: Job, source: Path, layers: int, given: argparse.Namespace, document: dict[str, Any]) -> None:
    """The rows of one size that ``document`` lacks."""
    rows = document["rows"]
    lacking = [m for m in given.methods if not any((r["layers"], r["method"]) == (layers, m) for r in rows)]
    if not lacking:
        return
    plan = cut(job, source, layers, given.cuts, given.setting)
    with tempfile.TemporaryDirectory() as folder:
        plans, costs = [plan], list[dict[str, Any]]()
        for method in lacking:
            place = Path(folder) / method
            place.mkdir()
            found, cost = repaired(source, plan, method, given, place)
            use_plan(job, found)
            plans, costs = [*plans, found], [*costs, cost]
            print(f"{layers} layers, {method}: {cost['seconds']:.0f} s", flush=True)
        document["dense"], losses = scored(job, plans, given.tokens, Path(folder))
    rises = [{kind: nll - document["dense"][kind] for kind, nll in one.items()} for one in losses]
    for method, cost, rise in zip(lacking, costs, rises[1:], strict=True):
        back = {kind: 1.0 - rise[kind] / rises[0][kind] for kind in rise}
        rows.append({"layers": layers, "method": method, "cut": rises[0], "rise": rise, "back": back, **cost})
        print(
            f"{layers} layers, {method}: taken back " + ", ".join(f"{k} {v:.1%}" for k, v in back.items()), flush=True
        )
    write_whole(given.save, json.dumps(document, indent=1) + "\n")


def table(documents: list[dict[str, Any]]) -> str:
    """In Markdown: a row for each size, a column for each repair."""
    lines = list[str]()
    for document in documents:
        methods = list(dict.fromkeys(row["method"] for row in document["rows"]))
        lines += [f"**{document['model']}**, {document['num_layers']} layers", ""]
        lines += ["| layers that stay | cut alone | " + " | ".join(methods) + " |", "|---" * (2 + len(methods)) + "|"]
        for layers in dict.fromkeys(row["layers"] for row in document["rows"]):
            found = {row["method"]: row for row in document["rows"] if row["layers"] == layers}
            first = next(iter(found.values()))
            cells = [f"{layers}", f"{_mean(first['cut']):.3f}"]
            for method in methods:
                row = found.get(method)
                shares = "" if row is None else " / ".join(f"{100 * row['back'][kind]:.0f}" for kind in row["back"])
                cells.append("" if row is None else f"{_mean(row['rise']):.3f} ({shares} %), {row['seconds']:.0f} s")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _mean(by_kind: dict[str, float]) -> float:
    return sum(by_kind.values()) / len(by_kind)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "bundled")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--cuts", type=Path, help="results of bench_real.py of the same model")
    parser.add_argument("--setting", default=CUTS, help="whose rows of --cuts")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25])
    methods = [name for name in REPAIRS if name != "none"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text that judges")
    parser.add_argument("--repair-tokens", type=int, default=40_000)
    parser.add_argument("--repair-text", type=Path, metavar="FILE", help="instead of what ships")
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
    head: dict[str, Any] = {"benchmark": "repair", "date": datetime.now(UTC).date().isoformat()}
    head |= {"environment": environment(given.threads), "note": given.note, "model": given.model}
    head |= {"num_layers": job.num_layers, "tokens": given.tokens, "repair_tokens": given.repair_tokens}
    head["cut"] = given.setting if given.cuts else "block-influence"
    document = head | {"dense": {}, "rows": []}
    if given.save.exists():
        document |= json.loads(given.save.read_text(encoding="utf-8"))
    for layers in sizes(job.num_layers, tuple(given.shares)):
        measure(job, source, layers, given, document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
