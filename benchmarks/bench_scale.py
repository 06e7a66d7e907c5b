"""Does a job read more of each model byte as models get deeper?

Question   Reads, time and peak memory of the whole job for 8 to 80 layers of one width, with nothing resident.
Ceiling    What the simulation (simulate_reads.py) says of a search with the same decisions and as many candidates a
sweep. Method     Synthetic Llamas of one width. Each prune is a process of its own with a budget that leaves nothing
resident.
           Bytes read are what the job's own report counts, in multiples of the decoder layers' bytes; embedding, head
           and norms are read too and are why measured values lie a little above.

    python benchmarks/bench_scale.py [--layers 8 16 32 48 80] [--lookahead 32] [--threshold 0.65] [--save FILE]

The last line of stdout is one JSON document. Exit code 1 where more is read than simulated and 15 % on top.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from about import report
from make_checkpoint import Shape, make_checkpoint
from measure import run
from simulate_reads import Moment, Reader, Simulation

from streamcollapse.merge.plan import Plan
from streamcollapse.searches.algorithm1 import SearchState
from streamcollapse.settings.search import SearchOptions
from streamcollapse.units import format_bytes

WIDTH = Shape(8, 1024, 2816, 16, 16)
ALLOWED = 1.15


class Recorded:
    """The outcomes of a real search, by the pointer; what it did not try counts as rejected."""

    def __init__(self, plan: Plan) -> None:
        assert plan.search is not None
        self._accepted = {decision.l for decision in plan.search.decisions if decision.accepted}

    def __call__(self, state: SearchState, moment: Moment) -> bool:
        return state.pointer in self._accepted


def simulated(num_layers: int, plan: Plan, options: SearchOptions, nodes: int) -> float:
    """Model reads of reference pass, search and write."""
    reader = Reader(num_layers, 0, True)
    Simulation(SearchState.start(num_layers, options), Recorded(plan), nodes, [reader]).run()
    return reader.read / num_layers


def smallest_budget(command: list[str]) -> str:
    """What the program itself says is the least that would do."""
    done = subprocess.run([*command, "--ram-budget", "1"], capture_output=True, text=True, check=False)
    found = re.search(r"--ram-budget (\d+MiB)", done.stderr)
    if found is None:
        raise SystemExit(done.stderr)
    return found[1]


def one(num_layers: int, given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Make, prune and remove one model."""
    shape = Shape(num_layers, *list(vars(WIDTH).values())[1:])
    source, out = place / f"{num_layers}-layers", place / "out"
    make_checkpoint(source, shape)
    command = [
        sys.executable,
        "-m",
        "streamcollapse",
        "prune",
        str(source),
        "--out",
        str(out),
        "--json",
        "--strategy",
        "laco",
        "--rule",
        given.rule,
    ]
    command += ["--lookahead", str(given.lookahead), "--threshold", str(given.threshold)]
    measured = run([*command, "--ram-budget", smallest_budget(command)], dict(os.environ))
    document, usage = measured.document, measured.document["usage"]
    plan = Plan.load(out / "streamcollapse_plan.json")
    layer_bytes = sum(p.stat().st_size for p in source.glob("*.safetensors")) - 2 * 2 * shape.vocabulary * shape.hidden
    options = SearchOptions(strategy="laco", threshold=given.threshold, rule=given.rule)
    row = {
        "layers": num_layers,
        "layers_after": document["layers"]["after"],
        "resident_layers": usage["memory"]["resident_layers"],
        "reads": usage["bytes_read"] / layer_bytes,
        "simulated": simulated(num_layers, plan, options, given.lookahead),
        "seconds": usage["seconds"],
        "peak_rss": measured.peak_rss,
        "peak_anonymous_rss": measured.peak_anonymous_rss,
        "phases": {p["name"]: p["bytes_read"] / layer_bytes for p in usage["phases"]},
    }
    for directory in (source, out):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 48, 80])
    parser.add_argument("--lookahead", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=0.65)
    parser.add_argument("--rule", default="sequential")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    print(__doc__.split("\n\n")[1])
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for num_layers in given.layers:
            row = one(num_layers, given, Path(temporary))
            rows.append(row)
            print(
                f"{num_layers:>3} -> {row['layers_after']:>2} layers  {row['reads']:.2f} model reads "
                f"(simulated {row['simulated']:.2f})  {row['seconds']:6.1f} s  peak "
                f"{format_bytes(row['peak_anonymous_rss'] or row['peak_rss'])}",
                flush=True,
            )
    settings = {"lookahead": given.lookahead, "threshold": given.threshold, "rule": given.rule, "allowed": ALLOWED}
    report("scale", {"settings": settings, "rows": rows}, given.save)
    outside = 2 * 32000 * WIDTH.hidden / (12 * WIDTH.hidden**2)  # embedding and head in layers, read once by the write
    sys.exit(0 if all(r["reads"] <= ALLOWED * r["simulated"] + outside / r["layers"] for r in rows) else 1)


if __name__ == "__main__":
    main()
