"""How fast this machine is at a job, as it is now: a probe of seconds of the model's own layers, samples and disk.

What was read for it is read again by the job; it shares the machine with whatever else runs, as the job will.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from streamcollapse.forward.batches import KEPT_BYTES, Batch, distributions_bytes, logits_tokens, one_in
from streamcollapse.forward.measure import make_measure
from streamcollapse.forward.model import LayerWeights, StreamedModel
from streamcollapse.forward.reference import Reference
from streamcollapse.merge.plan import original_layers
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import silent
from streamcollapse.resources.device import heap_for
from streamcollapse.resources.meter import Meter
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.run.opened import Job, open_stream
from streamcollapse.run.samples import Samples
from streamcollapse.settings.catalogue import METRICS, Effort
from streamcollapse.storage.probe import cached_share, read_rate, write_rate
from streamcollapse.storage.source import ObservedSource

LEAST_SECONDS = 1.0  # of each measurement, unless one call takes longer
_READ_BYTES = 1 << 27
_WRITTEN_BYTES = 1 << 26


@dataclass(frozen=True)
class Rates:
    """Seconds. ``run``: of one layer over all samples; ``judge``: to say how alike a candidate is that has reached the
    top; ``scout_run`` and ``scout_judge``: the same by the scout (0 where there is none); ``ready``: of making a layer
    ready to run; ``read``: of bringing in a layer; ``first``: of bringing in all that the page cache lacks; ``begin``:
    of all that is done once; ``written``: of a byte, to the disk; ``word``: of the logits of a token, for the verdict
    (0 where there is none)."""

    run: float
    judge: float
    scout_run: float
    scout_judge: float
    ready: float
    read: float
    first: float
    begin: float
    written: float
    word: float


def probe(
    job: Job, samples: Samples, memory: MemoryPlan, judged: tuple[str, Effort], place: Path, verdict: bool
) -> Rates:
    """Measure what a search of ``job`` does again and again; ``judged``: by which metric, with what effort; ``place``:
    where it will write; ``verdict``: whether the result is judged. Raises what the search would raise of its head."""
    metric, effort = judged
    missing = 1.0 - cached_share(job.checkpoint)
    cold = read_rate(job.checkpoint, memory.io, _READ_BYTES) if missing else None
    meter = Meter(job.placement.device)
    quiet = replace(job, meter=meter, source=ObservedSource(job.overlay, meter.read), listener=silent)
    count = job.num_layers
    index = count // 2 if memory.resident_layers == count else min(count // 2, count - memory.resident_layers - 1)
    with open_stream(quiet, memory) as stream, heap_for(memory.activations), torch.inference_mode():
        model = quiet.model(stream)
        view = MergedView(stream.source, model.layout, [original_layers(count)[index]], merge_norms=False)
        names = view.source_names(0)
        found = dict[str, float]()
        for number in range(2):  # the first time it may come from the disk, and warms up
            ready, layers = meter.pace.reading, meter.pace.layers
            with meter.phase("probe") as usage, stream.run([names]) as weights_pass:
                over = view.over(weights_pass)
                with weights_pass.step(), model.onload(over, 0) as weights:
                    if number:
                        computing = _Computing(model, index, weights, metric, job.vocabulary)
                        found = computing.rates(samples.batches, effort)
                        found["word"] = computing.word() if verdict else 0.0
            assert meter.pace.layers == layers + 1
    written = write_rate(next(p for p in [place, *place.resolve().parents] if p.is_dir()), _WRITTEN_BYTES)
    return Rates(
        **found,
        ready=max(meter.pace.reading - ready - usage.seconds_reading, 0.0),
        read=usage.seconds_reading * (1.0 - memory.resident_layers / count),
        first=job.checkpoint.num_bytes * missing / cold if cold else 0.0,
        written=0.0 if written is None else 1.0 / written,
    )


@dataclass(frozen=True)
class _Computing:
    """What is computed with: the layer ``index`` with its ``weights``, and ``metric`` over a ``vocabulary``."""

    model: StreamedModel
    index: int
    weights: LayerWeights
    metric: str
    vocabulary: int

    def rates(self, batches: Sequence[Batch], effort: Effort) -> dict[str, float]:
        """Those of ``Rates`` that are about computing, by name."""
        tokens = effort.head_tokens(self.vocabulary) if METRICS[self.metric].by_logits else None
        run, judge, begin = self._measured(batches, tokens)
        found = {"run": run, "judge": judge, "scout_run": 0.0, "scout_judge": 0.0, "begin": begin}
        most = effort.scouting
        if most is None or max(max(batch.lengths) for batch in batches) <= most:
            return found
        shorter = [Batch(b.input_ids_NT[:, :most], tuple(min(n, most) for n in b.lengths)) for b in batches]
        run, judge, more = self._measured(shorter, None if tokens is None else tokens // 2)
        return found | {"scout_run": run, "scout_judge": judge, "begin": begin + more}

    def word(self) -> float:
        """Seconds for the logits of a token."""
        count, device = logits_tokens(self.vocabulary, self.model.placement.grain), self.model.placement.device
        hidden_1TD = torch.zeros(1, count, self.model.hidden_size, dtype=self.model.placement.dtype, device=device)
        head = self.model.head()
        self.model.logits(head, hidden_1TD)
        return _each(lambda: self.model.logits(head, hidden_1TD), device) / count

    def _measured(self, batches: Sequence[Batch], tokens: int | None) -> tuple[float, float, float]:
        """Seconds to run the layer over ``batches``, to judge a candidate by them, and to begin to judge. Measured on
        the first, which is the largest."""
        model, batch = self.model, batches[0]
        share = batch.input_ids_NT.numel() / sum(b.input_ids_NT.numel() for b in batches)
        recording = model.record([batch])[0]

        def run() -> torch.Tensor:
            return model.run(self.index, self.weights, recording.hidden_NTD, recording.calls[self.index])

        hidden = run()
        run_seconds = _each(run, model.placement.device) / share
        original = Reference([batch], [recording.calls], 0, [], [model.last_hidden(hidden)], [hidden])
        start = time.perf_counter()
        head = model.head() if METRICS[self.metric].by_logits else {}
        begin = time.perf_counter() - start
        some = None if tokens is None else max(round(tokens * share), 1)
        measure = make_measure(self.metric, model, original, self.vocabulary, some, lambda: head)
        measure([hidden])
        judge = _each(lambda: measure([hidden]), model.placement.device) / share
        lengths = [b.lengths for b in batches]
        item = model.placement.dtype.itemsize
        kept = distributions_bytes(lengths, self.vocabulary, one_in(lengths, tokens), item) <= KEPT_BYTES
        again = 1.0 if kept or self.metric != "kl" else 2.0  # the original's distributions are made anew
        return run_seconds, again * judge, begin + 2.0 * judge


def _each(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``call``, which has been called before."""
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < LEAST_SECONDS:
        call()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return seconds / count
