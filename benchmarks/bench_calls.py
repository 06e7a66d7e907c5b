"""What does a call of a layer cost beyond its tokens, and what does a heap save that keeps its activations?

Question   How many tokens' time does one more call take (CALL_COST in forward/batches.py)? How long does a pass over
the
           passages take, and how many pages does it fault in, with the smallest thresholds of the heap and with those
           for the job (resources/device.py)?
Ceiling    A pass without page faults.
Method     All weights in memory, so that nothing is read. Passes over one call each of several shapes, in turn; a line
           through the medians of those of at most 512 tokens: where it meets no tokens, in tokens. Then passes over the
           first two calls of the passages, with each of the two heaps in turn: the second of two passes in a row. The
           first round of calls does not count.

    python benchmarks/bench_calls.py [--source DIR | --shape tinyllama-1.1b] [--layers 4] [--repeat 5] [--save FILE]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from about import report
from make_checkpoint import SHAPES, make_checkpoint

from streamcollapse.forward.batches import Batch, call_tokens
from streamcollapse.forward.reference import reference_pass
from streamcollapse.resources.device import heap_for
from streamcollapse.run.memory_plan import plan_one_layer
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.run.opened import Job, open_job, open_stream
from streamcollapse.run.samples import calibration_samples
from streamcollapse.settings.run import Calibration, Compute, RunSettings, Streaming
from streamcollapse.stream.weights import WeightStream

CALLS = [(1, 8), (1, 18), (2, 26), (7, 36), (3, 100), (10, 36), (2, 250)]  # rows, tokens


def one_pass(job: Job, stream: WeightStream, batches: list[Batch]) -> tuple[float, int]:
    """Seconds and page faults of a pass."""
    model, before = job.model(stream), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    reference_pass(model, batches, range(0))
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measured(source: Path, repeat: int) -> dict[str, Any]:
    job = open_job(source, RunSettings(Compute("cpu")))
    choice = MemoryPlan(2, resident_layers=job.num_layers, drop_after_use=False, io="pread")
    with open_stream(job, choice) as stream:
        return measured_on(job, stream, source, repeat)


def measured_on(job: Job, stream: WeightStream, source: Path, repeat: int) -> dict[str, Any]:
    heap = plan_one_layer(job, Streaming(), call_tokens(job.width)).activations
    calls: dict[tuple[int, int], list[float]] = {shape: [] for shape in CALLS}
    with heap_for(heap):
        for _ in range(repeat + 1):
            for shape, seconds in calls.items():
                batch = Batch(torch.randint(2, min(job.vocabulary, 4000), shape), (shape[1],) * shape[0])
                seconds.append(one_pass(job, stream, [batch])[0])
    medians = {shape: statistics.median(seconds[1:]) for shape, seconds in calls.items()}
    slope, at_none = numpy.polyfit([rows * tokens for rows, tokens in CALLS], list(medians.values()), 1)
    batches = calibration_samples(job, Calibration("passages"), "passages").batches[:2]
    heaps: dict[str, list[tuple[float, int]]] = {"smallest": [], "for the job": []}
    for _ in range(repeat):
        for runs, activations in zip(heaps.values(), (0, heap), strict=True):
            with heap_for(activations):
                one_pass(job, stream, batches)
                runs.append(one_pass(job, stream, batches))
    return {
        "source": source.name,
        "layers": job.num_layers,
        "compute": job.compute(),
        "call_seconds": {f"{rows}x{tokens}": seconds for (rows, tokens), seconds in medians.items()},
        "call_costs_tokens": at_none / slope,
        "passages_calls": [tuple(batch.input_ids_NT.shape) for batch in batches],
        "heaps": {
            name: {"runs": runs, "median_seconds": statistics.median(seconds for seconds, _ in runs)}
            for name, runs in heaps.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a checkpoint directory instead of a synthetic one")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    print(__doc__.split("\n\n")[1])
    with tempfile.TemporaryDirectory() as temporary:
        source = given.source or Path(temporary) / f"{given.shape}-{given.layers}-layers"
        if given.source is None:
            make_checkpoint(source, replace(SHAPES[given.shape], layers=given.layers))
        found = measured(source, given.repeat)
    print(f"one more call takes the time of {found['call_costs_tokens']:.0f} tokens")
    for name, row in found["heaps"].items():
        faults = statistics.median(faults for _, faults in row["runs"])
        print(f"heap {name}: {row['median_seconds']:.3f} s, {faults:.0f} page faults")
    report("calls", found, given.save)


if __name__ == "__main__":
    main()
