"""How alike the layers of a model are: their weights, what they do to hidden states, and every merge of neighbours."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamcollapse.errors import OptionError
from streamcollapse.forward.measure import make_measure
from streamcollapse.forward.metrics import NeighbourDistances, block_influence, neighbour_cosines
from streamcollapse.forward.reference import Branches, reference_sweep
from streamcollapse.merge.plan import collapse, original_layers
from streamcollapse.merge.view import mismatch
from streamcollapse.progress import Listener, PhaseStarted, silent
from streamcollapse.resources.device import heap_for
from streamcollapse.resources.meter import Usage
from streamcollapse.run.memory_plan import plan_memory
from streamcollapse.run.needs import Demand
from streamcollapse.run.opened import open_job, open_run
from streamcollapse.run.samples import calibration_samples
from streamcollapse.run.saved_reference import save_reference, work_key
from streamcollapse.run.work_directory import search_work
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.evaluator import Evaluator
from streamcollapse.searches.registry import complete
from streamcollapse.searches.space import check_prunable
from streamcollapse.settings.run import RunSettings
from streamcollapse.settings.search import SearchOptions, Variant
from streamcollapse.storage.disk import write_whole

FORMAT = "streamcollapse.similarity/1"
SIMILARITY_FILE = "similarity.json"


@dataclass(frozen=True)
class Similarities:
    """``weight_distances[suffix][i]``: L2 between layers i and i + 1. ``hidden_cosines[i]``, ``block_influence[i]``:
    between what enters layer i and what leaves it. ``merges[rule][size][start]``: similarity by ``metric`` of the model
    in which ``size`` layers from 0-based ``start`` on are one, None where they cannot be. ``usage``: what it cost."""

    source: str
    num_layers: int
    metric: str
    calibration_sha256: str
    weight_distances: dict[str, list[float | None]]
    hidden_cosines: list[float]
    block_influence: list[float]
    merges: dict[str, dict[int, list[float | None]]]
    usage: Usage

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, directory: Path) -> None:
        """Write ``similarity.json`` into ``directory``. Raises OutputError."""
        write_whole(directory / SIMILARITY_FILE, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


def similarity(
    source: str | Path,
    options: SearchOptions = SearchOptions(rule="best", strategy="laco"),  # noqa: B008 - frozen
    *,
    settings: RunSettings = RunSettings(),  # noqa: B008
    listener: Listener = silent,
) -> Similarities:
    """How alike the layers of the checkpoint ``source`` are. Writes nothing.

    Of ``options`` count the largest group that is merged (``layers_per_merge``), the rules, the metric, the range and
    the norms. Streams the model once, with as many merges as there is memory for, and again for the others. Raises
    StreamCollapseError.
    """
    job = open_job(source, settings, listener)
    if job.num_layers < 2:
        raise OptionError("the model has one layer, which nothing can be compared with")
    options = complete(options).for_model(job.num_layers)
    samples = calibration_samples(job, settings.calibration, "sentences")
    found = list(_groups(job.num_layers, options))
    for _, _, candidate in found[:1]:
        check_prunable(job, candidate)
    streaming = settings.streaming
    demand = Demand(job.num_layers + 1, options.layers_per_merge, options.metric)
    memory = plan_memory(job, samples, streaming, demand)
    listener(memory.event)
    distances = NeighbourDistances()
    with (
        search_work(work_key(job, samples, options.merge_norms), options, streaming, memory.spill, None) as work,
        open_run(job, memory, work.path) as run,
        heap_for(memory.activations),
    ):
        first = [c for _, _, c in found if mismatch(job.source, job.architecture.layout, c.merged_layer) is None]
        first = first[: streaming.lookahead or memory.candidates]
        branches = Branches(
            [candidate.layers for candidate in first],
            options.merge_norms,
            lambda reference: make_measure(options.metric, run.model, reference, job.vocabulary),
            distances.add,
        )
        with job.meter.phase("reference"):
            listener(PhaseStarted("reference", job.num_layers))
            reference, known = reference_sweep(run.model, samples.batches, work.scratch, branches)
            save_reference(job, work, reference)
        evaluator = Evaluator(run, reference, work.memory, options, streaming.lookahead)
        evaluator.learn(first, known)
        with job.meter.phase("search"):  # what there was no memory for in the first pass
            listener(PhaseStarted("search"))
            scores = evaluator.scores([candidate for _, _, candidate in found], original_layers(job.num_layers))
        merges: dict[str, dict[int, list[float | None]]] = {}
        for (variant, size, candidate), score in zip(found, scores, strict=True):
            row = merges.setdefault(variant.label, {}).setdefault(size, [None] * (job.num_layers - size + 1))
            row[candidate.position] = score.similarity
        return Similarities(
            job.name,
            job.num_layers,
            options.metric,
            samples.digest,
            distances.distances,
            neighbour_cosines(reference, job.num_layers),
            block_influence(reference, job.num_layers),
            merges,
            job.meter.summary(),
        )


def _groups(num_layers: int, options: SearchOptions) -> Iterator[tuple[Variant, int, Candidate]]:
    """Every group of 2 to C neighbours within L and H as one layer, by each of the rules."""
    whole = original_layers(num_layers)
    assert options.highest is not None
    for variant in options.variants:
        for size in range(2, min(options.layers_per_merge, num_layers) + 1):
            for start in range(options.lowest - 1, options.highest - size + 1):
                layers = collapse(whole, start, size - 1, variant.rule, variant.scale)
                yield variant, size, Candidate(start + 1, size - 1, layers, (variant.label,))
