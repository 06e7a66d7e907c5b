"""What does a step of healing save where the graphs of all layers are kept, and what do they take?

Question   Processor and wall time of a step with graphs kept and with layers run again, and the peak of memory.
Ceiling    Of a run of a layer, a second one, and twice as much downward, the second is saved: a quarter, without the
           head.
Method     A model of real_models.py, cut by block influence, healed in this process a few steps at a time, both ways
           in turns. A step's time is the mean over all but the first. Results are thrown away; both ways give the same
           bits (tests/healing/test_updown.py).

    python benchmarks/bench_graphs.py --model NAME --models DIR --save FILE [--train lora:all] [--share 0.2]
                                      [--heal-tokens 8000] [--turns 2] [--threads N]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from real_runs import add_row, opened, options
from real_settings import sizes

from streamcollapse import Healing, RunSettings, SearchOptions, prune
from streamcollapse.errors import NothingLearnedError
from streamcollapse.jobs.heal import run_heal
from streamcollapse.jobs.prepare_heal import prepare_heal
from streamcollapse.progress import Event, StepLearned
from streamcollapse.run.needs import Kept
from streamcollapse.settings.run import Judging

OPTIONS: dict[str, dict[str, Any]] = {
    "--train": {"default": "lora:all"},
    "--share": {"type": float, "default": 0.2},
    "--heal-tokens": {"type": int, "default": 8000},
    "--turns": {"type": int, "default": 2},
}
WAYS: tuple[Kept, ...] = ("graphs", "ram")
QUIET = RunSettings(judging=Judging(verdict=False))


def steps(pruned: Path, healing: Healing, kept: Kept, out: Path) -> dict[str, Any]:
    """Seconds of a step, by the clock and of all cores, and the peak of anonymous memory."""
    times: list[tuple[float, float]] = []

    def listener(event: Event) -> None:
        if isinstance(event, StepLearned):
            times.append((time.perf_counter(), time.process_time()))

    prepared = prepare_heal(pruned, out, healing, QUIET, listener)
    memory = replace(prepared.lessons.memory, kept=kept)
    try:
        usage = run_heal(replace(prepared, lessons=replace(prepared.lessons, memory=memory))).report["usage"]
    except NothingLearnedError:  # so few steps may teach nothing
        usage = prepared.job.meter.summary()
    (phase,) = (phase for phase in usage["phases"] if phase["name"] == "heal")
    wall, cpu = ((times[-1][n] - times[0][n]) / (len(times) - 1) for n in range(2))
    return {"kept": kept, "seconds": wall, "cpu_seconds": cpu, "peak_anonymous_rss": phase["peak_anonymous_rss"]}


def main() -> None:
    """Run it."""
    given = options(__doc__, OPTIONS)
    source, job, document = opened("bench_graphs", given, train=given.train, heal_tokens=given.heal_tokens)
    (layers,) = sizes(job.num_layers, (given.share,))
    healing = Healing(source, train=given.train, tokens=given.heal_tokens, judge_every=100, loss_tokens=256)
    with tempfile.TemporaryDirectory() as place:
        cut = SearchOptions(strategy="block-influence", target_layers=layers)
        pruned = prune(source, Path(place) / "pruned", cut, settings=QUIET).out
        for turn in range(given.turns):
            for kept in WAYS:
                row = {"layers": layers, "turn": turn, **steps(pruned, healing, kept, Path(place) / f"{kept}-{turn}")}
                add_row(document, row, given.save)
                print(row, flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
