"""Passes of the streamed forward over the calibration samples, one after the other in one process, with nothing kept
between them but the stream's own memory.

    python our_passes.py SOURCE --calibration FILE [--dtype bfloat16] [--passes 3] [--cold] [--threads N]

The last line of stdout is one JSON document; ``passes`` are the seconds of each, embedding and final norm included.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from streamcollapse.forward.batches import call_tokens
from streamcollapse.forward.reference import reference_pass
from streamcollapse.resources.device import heap_for
from streamcollapse.run.memory_plan import plan_one_layer
from streamcollapse.run.opened import open_job, open_stream
from streamcollapse.run.samples import calibration_samples
from streamcollapse.settings.run import Calibration, Compute, RunSettings, Streaming
from streamcollapse.storage.probe import forget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="one sample a line")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the weights from the page cache before each pass")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    start = time.perf_counter()
    job = open_job(given.source, RunSettings(Compute("cpu", given.dtype)))
    samples = calibration_samples(job, Calibration(given.calibration), "sentences")
    choice = plan_one_layer(job, Streaming(), call_tokens(job.width))
    passes = []
    with open_stream(job, choice) as stream, heap_for(choice.activations):
        model = job.model(stream)
        prepared = time.perf_counter() - start
        for _ in range(given.passes):
            if given.cold:
                forget(job.checkpoint)
            start = time.perf_counter()
            reference = reference_pass(model, samples.batches, range(0))
            passes.append(time.perf_counter() - start)
    norms = [
        float(row[:length].float().norm()) ** 2
        for hidden, batch in zip(reference.last_hidden, samples.batches, strict=True)
        for row, length in zip(hidden, batch.lengths, strict=True)
    ]
    document = {
        "did": f"{given.passes} streamed passes of the decoder, {choice.io}",
        "parts": {"prepare": prepared, "pass": passes[0]},
        "passes": passes,
        "tokens": sum(sum(batch.lengths) for batch in samples.batches),
        "norm_of_last_hidden": sum(norms) ** 0.5,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
