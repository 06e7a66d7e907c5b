"""Is a streamed pass as fast as the slower of reading and computing?

Question   How long does one pass over all decoder layers take, cold and warm, by each way of reading, in multiples of
           max(time to read the same bytes alone, time to compute the same layers alone)?
Ceiling    1.00: reading and computing overlap wholly. Wanted: at most 1.15.
Method     One process. In each round, one after the other: all layers read and let go of, nothing computed; all layers
           computed with the weights at hand, in memory of their own; the pass. Cold: the checkpoint is dropped from
           the page cache before each of the three. Medians over the rounds.
           One weight stream for all rounds, as a job has one for all its phases: its slots are made in the first.
           With a CUDA device the copies to it are part of reading.
Verdict    The ways stand side by side; wanted is asked of the one that ``--io auto`` takes: warm, and cold for a
           checkpoint that does not fit into memory (one that fits is cold only once).

    python benchmarks/bench_engine.py [--source DIR | --model NAME --models DIR | --shape llama-1.4b]
                                      [--io mmap pread direct] [--repeat 5]
                                      [--tokens 0] [--save FILE]

``--tokens N`` calibrates on one sample of N tokens instead of the ten sentences: fewer make the pass bound by reading.
The last line of stdout is one JSON document. Exit code 1 if a pass that auto would take needs more than 1.15 times the
ceiling.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from about import report
from make_checkpoint import SHAPES, make_checkpoint
from real_models import add_options, chosen_model

from streamcollapse.forward.batches import Batch, make_batches
from streamcollapse.forward.reference import reference_pass
from streamcollapse.run.memory_plan import choose_io
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.run.opened import Job, open_job, open_stream
from streamcollapse.run.samples import calibration_samples
from streamcollapse.settings.run import Calibration, Compute, RunSettings
from streamcollapse.storage.probe import forget
from streamcollapse.stream.weights import WeightStream
from streamcollapse.units import format_bytes

WANTED = 1.15
REST_SECONDS = 5.0


@dataclass(frozen=True)
class Subject:
    """What is measured: an open checkpoint and the batches that go through it."""

    job: Job
    batches: list[Batch]

    def stream(self, io: str, resident: bool = False) -> AbstractContextManager[WeightStream]:
        """A stream for one measurement; ``resident``: the weights stay once they are read."""
        layers = self.job.num_layers if resident else 0
        return open_stream(self.job, MemoryPlan(2, resident_layers=layers, drop_after_use=False, io=io))

    def run(self, stream: WeightStream) -> tuple[float, float]:
        """Seconds of a pass, and of its layers' computation alone."""
        job, before = self.job, self.job.meter.pace.computing
        model = job.model(stream)
        start = time.perf_counter()
        reference_pass(model, self.batches, range(0))
        if job.placement.device.type == "cuda":
            torch.cuda.synchronize(job.placement.device)
        return time.perf_counter() - start, job.meter.pace.computing - before

    def read(self, stream: WeightStream) -> float:
        """Seconds to read every layer, in the order of a pass."""
        layout = self.job.architecture.layout
        steps = [layout.layer_names(i) for i in range(layout.num_layers)]
        start = time.perf_counter()
        with stream.run(steps) as weights:
            for _ in steps:
                with weights.step():
                    pass
        return time.perf_counter() - start


def measure(subject: Subject, io: str, cold: bool, repeat: int) -> dict[str, Any]:
    """Every round and the medians of one way of reading."""
    rounds: dict[str, list[float]] = {"read": [], "compute": [], "pass": []}
    with subject.stream("pread", resident=True) as at_hand, subject.stream(io) as stream:
        subject.run(at_hand)
        for _ in range(repeat):
            if cold:
                drop(subject)
            rounds["read"].append(subject.read(stream))
            if cold:
                drop(subject)
            rounds["compute"].append(subject.run(at_hand)[0])
            if cold:
                drop(subject)
            rounds["pass"].append(subject.run(stream)[0])
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    ratio = medians["pass"] / max(medians["read"], medians["compute"])
    return {"io": io, "cache": "cold" if cold else "warm", "ratio": ratio, "medians": medians, "rounds": rounds}


def drop(subject: Subject) -> None:
    """Out of the page cache; then a rest, in which a virtual machine gives the freed memory back to its host."""
    forget(subject.job.checkpoint)
    time.sleep(REST_SECONDS)


def automatic(subject: Subject, cold: bool) -> str:
    """The way of reading that ``--io auto`` takes."""
    job = subject.job
    if cold:
        forget(job.checkpoint)
    else:
        with subject.stream("mmap") as stream:
            subject.run(stream)
    return choose_io(job, "auto", MemoryPlan(2, drop_after_use=cold))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a checkpoint directory instead of a synthetic one")
    add_options(parser)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.4b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--io", nargs="+", default=["mmap", "pread", "direct"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    print(__doc__.split("\n\n")[1])
    with tempfile.TemporaryDirectory() as temporary:
        source = given.source or chosen_model(given) or Path(temporary) / "source"
        if not source.exists():
            shape = SHAPES[given.shape]
            make_checkpoint(source, replace(shape, layers=given.layers or shape.layers))
        job = open_job(source, RunSettings(Compute()))
        samples = calibration_samples(job, Calibration("sentences"), "sentences").batches
        subject = Subject(job, make_batches([list(range(2, given.tokens + 2))]) if given.tokens else samples)
        tokens = sum(sum(batch.lengths) for batch in subject.batches)
        layout = job.architecture.layout
        stored = sum(job.checkpoint.info(n).num_bytes for i in range(job.num_layers) for n in layout.layer_names(i))
        print(f"{source.name}: {job.num_layers} layers, {format_bytes(stored)}; {tokens} tokens; {job.compute()}")
        results = []
        for cold in (False, True):
            chosen = automatic(subject, cold)
            for io in dict.fromkeys([*given.io, chosen]):
                found = {**measure(subject, io, cold, given.repeat), "chosen_by_auto": io == chosen}
                results.append(found)
                parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found["medians"].items())
                rate = stored / found["medians"]["read"] / 1e9
                verdict = "" if io != chosen else "  auto: met" if found["ratio"] <= WANTED else "  auto: MISSED"
                print(f"{found['cache']}  {io:<7} {parts}  ({rate:.2f} GB/s alone)  {found['ratio']:.2f}{verdict}")
    made = given.shape if source.parent == Path(temporary) else source.name
    body = {"shape": made, "layers": job.num_layers, "layer_bytes": stored, "tokens": tokens, "results": results}
    report("engine", {**body, "wanted": WANTED, "compute": job.compute()}, given.save)
    sys.exit(0 if all(result["ratio"] <= WANTED for result in results if result["chosen_by_auto"]) else 1)


if __name__ == "__main__":
    main()
