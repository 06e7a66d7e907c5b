"""A page about results: what stays of the source, how that was found, what it costs and what it says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcollapse.forward.continuation import continuations
from streamcollapse.jobs.compare import compared, open_source
from streamcollapse.merge.plan import original_layers
from streamcollapse.output.page import Sample, build_page
from streamcollapse.output.results import Comparison, Result, load_results, source_of
from streamcollapse.progress import Listener, PhaseStarted, WarningRaised, silent
from streamcollapse.resources.device import heap_for
from streamcollapse.run.first_checks import check_plan_path
from streamcollapse.run.memory_plan import plan_one_layer
from streamcollapse.run.opened import Job, open_stream
from streamcollapse.run.samples import load_tokenizer, tokenize
from streamcollapse.settings.run import Comparing, RunSettings
from streamcollapse.storage.disk import write_whole
from streamcollapse.storage.staging import make_parents

PROMPTS = (
    "The city was founded in",
    "The most important thing about water is that",
    "Once upon a time, in a small village by the sea, there lived",
)
NEW_TOKENS = 24


@dataclass(frozen=True)
class WrittenPage:
    """Where the page is, what was measured for it (None: the source was not at hand), and what the models said."""

    out: Path
    comparison: Comparison | None
    samples: list[Sample]

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        comparison = None if self.comparison is None else self.comparison.to_json()
        samples = [
            {"prompt": sample.prompt, "said": [{"model": name, "text": text} for name, text in sample.said]}
            for sample in self.samples
        ]
        return {"out": str(self.out), "comparison": comparison, "samples": samples}


def report(
    plans: Sequence[str | Path],
    out: str | Path,
    *,
    conditions: Comparing = Comparing(),  # noqa: B008 - frozen
    settings: RunSettings = RunSettings(),  # noqa: B008
    listener: Listener = silent,
) -> WrittenPage:
    """Write one HTML page about ``plans`` (plans, or directories of pruned models, of one source) to the file ``out``.

    Where the source is at hand, or given in ``conditions``, loss on a held-out text is measured, and with
    ``conditions.samples`` each model goes on with a few prompts. Raises StreamCollapseError.
    """
    place = Path(out)
    check_plan_path(place, settings.output.overwrite, "out")
    results = load_results(plans)
    comparison, samples = None, list[Sample]()
    if source_of(results, conditions.source) is None:
        name = results[0].plan.source_name
        listener(WarningRaised(f"where {name} is, no plan says, so nothing is measured; give the model as `source`"))
    else:
        job = open_source(results, conditions, settings, listener)
        comparison = compared(job, results, conditions, settings)
        if conditions.samples:
            samples = _samples(job, results, comparison, settings)
    make_parents(place)
    write_whole(place, build_page(results, comparison, samples))
    return WrittenPage(place, comparison, samples)


def _samples(job: Job, results: Sequence[Result], comparison: Comparison, settings: RunSettings) -> list[Sample]:
    """What the source and each result that computes go on with."""
    tokenizer = load_tokenizer(job.checkpoint.directory, job.trust_remote_code)
    prompts = tokenize(tokenizer, PROMPTS, NEW_TOKENS, job.vocabulary)
    stacks = [(original_layers(job.num_layers), False), *((r.plan.layers, r.plan.merge_norms) for r in results)]
    models = [(m.name, *stack) for m, stack in zip(comparison.models, stacks, strict=True) if m.nll is not None]
    said: list[list[tuple[str, str]]] = [[] for _ in prompts]
    memory = plan_one_layer(job, settings.streaming, job.call_tokens)
    with open_stream(job, memory) as stream, job.meter.phase("samples"), heap_for(memory.activations):
        job.listener(PhaseStarted("samples", NEW_TOKENS * sum(len(layers) for _, layers, _ in models)))
        model = job.model(stream)
        for name, layers, merge_norms in models:
            for texts, ids in zip(said, continuations(model, layers, merge_norms, prompts, NEW_TOKENS), strict=True):
                texts.append((name, " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())))
    return [Sample(prompt, texts) for prompt, texts in zip(PROMPTS, said, strict=True)]
