"""Does a job take as long as the dry run says?

Question   What ``--dry-run`` says that a search and the write of its result take, against what they take.
Target     Within a factor of 1.5, on each of the real models (real_models.py).
Method     A job is prepared and timed (Prepared.timed: the probe that the dry run makes), then run, in one process.
           What counts is from then to the end: no start of Python. Processor time is told beside it: where the machine
           is shared, the probe sees what others take at that moment, and the job what they take later. Counted as
           well, whatever the machine: candidates and visits to layers, expected and done.

    python benchmarks/bench_estimates.py [--models DIR] [--model NAME] [--jobs NAME,..] [--work DIR] [--save FILE]

Jobs, to three quarters of the layers: block-influence; quick; standard (the default, with its repair), standard-search
(without), scales (instead); laco. NAME is one of real_models.py, or bundled. Exits 1 when the
target is missed. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from about import report
from real_models import MODELS, checkpoint

from streamcollapse import inspect
from streamcollapse.jobs.prepare import prepare_prune
from streamcollapse.jobs.prune import run_prune
from streamcollapse.progress import CandidatesDone, Event, LayerDone, PhaseStarted, RoundStarted
from streamcollapse.settings.run import Repair, RunSettings
from streamcollapse.settings.search import SearchOptions
from streamcollapse.units import format_seconds

MOST = 1.5
BUNDLED = "bundled"
JOBS: dict[str, tuple[dict[str, Any], str | None]] = {  # options of a search, and the repair; None: the usual one
    "block-influence": ({"strategy": "block-influence"}, None),
    "quick": ({"effort": "quick"}, None),
    "standard": ({"effort": "standard"}, None),
    "standard-search": ({"effort": "standard"}, "none"),
    "scales": ({"effort": "standard", "rescale": True}, "none"),
    "laco": ({"strategy": "laco"}, None),
}


@dataclass
class Counted:
    """What a job says of what it does: candidates and layers by phase, candidates by round."""

    phase: str = ""
    candidates: Counter[str] = field(default_factory=Counter)
    layers: Counter[str] = field(default_factory=Counter)
    rounds: dict[str, list[int]] = field(default_factory=dict)

    def listen(self, event: Event) -> None:
        match event:
            case PhaseStarted(name, _):
                self.phase = name
            case RoundStarted():
                self.rounds.setdefault(self.phase, []).append(0)
            case CandidatesDone(count, _):
                self.candidates[self.phase] += count
                self.rounds.setdefault(self.phase, [0])[-1] += count
            case LayerDone():
                self.layers[self.phase] += 1


def measured(source: Path, name: str, layers: int, place: Path) -> dict[str, Any]:
    """One job: what was expected of it, and what it took."""
    counted, (method, repair) = Counted(), JOBS[name]
    options, settings = SearchOptions(**method, target_layers=layers), RunSettings(repair=Repair(repair))
    prepared = prepare_prune(source, place / "out", options, settings, counted.listen).timed()
    assert prepared.expected is not None
    start, processor = time.perf_counter(), time.process_time()
    done = run_prune(prepared, resumable=False)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    usage, expected = done.report["usage"], prepared.expected
    ratio = seconds / expected.total
    print(
        f"{source.name}, {name}: expected {format_seconds(expected.total)}, took {format_seconds(seconds)} "
        f"({ratio:.2f} times as long)",
        flush=True,
    )
    work = {
        phase: {"candidates": [round(one.candidates + one.scouted, 1) for one in rounds]}
        | {"layers": round(sum(one.visits for one in rounds), 1)}
        for phase, rounds in prepared.work.items()
    }
    return {
        "model": source.name,
        "job": name,
        "layers": done.report["layers"],
        "expected_seconds": round(expected.total, 2),
        "seconds": round(seconds, 2),
        "ratio": round(ratio, 3),
        "processor_share": round(processor / seconds, 2),
        "load_at_the_end": [round(load, 1) for load in os.getloadavg()],
        "phases_expected": {phase: round(value, 2) for phase, value in expected.seconds.items()},
        "phases": {phase["name"]: round(phase["seconds"], 2) for phase in usage["phases"]},
        "work_expected": work,
        "work": {"candidates": counted.rounds, "layers": dict(counted.layers)},
    }


def _source(model: str, models: Path) -> Path:
    if model != BUNDLED:
        return checkpoint(model, models)
    with resources.as_file(resources.files("streamcollapse.data")) as data:
        return data / "wiki-llama-24l"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, BUNDLED], default=BUNDLED, metavar="NAME")
    parser.add_argument("--models", type=Path, default=Path("models"), metavar="DIR")
    parser.add_argument("--jobs", default=",".join(JOBS), metavar="NAME,..")
    parser.add_argument("--layers", type=int, help="of the result; three quarters by default")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where results are written and removed")
    parser.add_argument("--save", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    source, found = _source(arguments.model, arguments.models), []
    for name in arguments.jobs.split(","):
        layers = arguments.layers or math.ceil(0.75 * inspect(source).num_layers)
        with tempfile.TemporaryDirectory(dir=arguments.work) as place:
            found.append(measured(source, name, layers, Path(place)))
    missed = [one for one in found if not 1.0 / MOST <= one["ratio"] <= MOST]
    report("estimates", {"target": f"within a factor of {MOST}", "jobs": found}, arguments.save)
    if missed:
        sys.exit(f"missed: {', '.join(one['job'] for one in missed)}")


if __name__ == "__main__":
    main()
