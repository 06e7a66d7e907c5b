"""How long a job will take: what it computes, phase by phase, times what a probe of the machine says of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from streamcollapse.progress import TimeExpected
from streamcollapse.run.repair_needs import RepairText, repair_seconds
from streamcollapse.run.timing import Rates, probe
from streamcollapse.searches.exchange import exchange_rounds, is_exchanging
from streamcollapse.searches.registry import strategy_of
from streamcollapse.searches.rescale import scale_rounds
from streamcollapse.searches.strategy import fewest_layers
from streamcollapse.searches.work import Round
from streamcollapse.settings.catalogue import EFFORTS, METRICS

if TYPE_CHECKING:
    from streamcollapse.jobs.prepare import Prepared

_CHECKED_SECONDS = 2.0  # to build what is to be written on the model's own code, and to sync small files
_SHORT = 1e11  # operations; a probe takes longer than these


def work_of(prepared: Prepared) -> dict[str, list[Round]]:
    """What the search of ``prepared`` is expected to compute, by phase."""
    space, count = prepared.space, prepared.job.num_layers
    assert space is not None
    strategy, room = strategy_of(space.options), prepared.settings.streaming.lookahead or prepared.memory.candidates
    scouts = _has_scout(prepared)
    work = {"reference": [Round(runs=count, visits=count, reads=count)], "search": strategy.rounds(space, room, scouts)}
    if strategy.by_rounds and is_exchanging(space.options):
        work["exchanges"] = exchange_rounds(space, room, _times_as_long(prepared))
    if space.options.rescale:
        work["scales"] = scale_rounds(space, room, scouts)
    return work


def _times_as_long(prepared: Prepared) -> float:
    """As what judging a candidate takes in a search is what it takes in exchanges."""
    options, samples = prepared.options, prepared.samples
    assert options is not None
    assert samples is not None
    effort, vocabulary, most = EFFORTS[options.effort], prepared.job.vocabulary, samples.num_tokens
    usual, finer = effort.head_tokens(vocabulary), effort.exchange_tokens(vocabulary)
    if usual is None or finer is None or not METRICS[options.metric].by_logits:
        return 1.0
    return min(finer, most) / min(usual, most)


def _has_scout(prepared: Prepared) -> bool:
    assert prepared.options is not None
    assert prepared.samples is not None
    most = EFFORTS[prepared.options.effort].scouting
    return most is not None and prepared.samples.longest > most


def expected_time(prepared: Prepared) -> TimeExpected:
    """Of each phase of ``prepared``, which has a search, by a probe of a few seconds."""
    space, samples, job, out = prepared.space, prepared.samples, prepared.job, prepared.out
    assert space is not None
    assert samples is not None
    judges = prepared.held_out is not None and prepared.disk_free is not None
    place = Path.cwd() if out is None else out.parent
    judged = space.options.metric, EFFORTS[space.options.effort]
    needs_words = judges or prepared.lessons is not None or prepared.fit_text is not None
    rates = probe(job, samples, prepared.memory, judged, place, needs_words)
    phases = {
        name: [(one.seconds(rates), one.candidates + one.scouted) for one in rounds]
        for name, rounds in prepared.work.items()
    }
    saved = 0 if out is None else (job.num_layers + 2) * samples.num_tokens * job.hidden_size
    ((seconds, _),) = phases["reference"]
    seconds = max(seconds, rates.first) + saved * job.placement.dtype.itemsize * rates.written
    begin = rates.begin if any(count for rounds in phases.values() for _, count in rounds) else 0.0
    phases["reference"] = [(seconds + begin, 0.0)]
    phases |= _after_the_search(prepared, rates, samples.num_tokens)
    return TimeExpected(tuple((name, tuple(found)) for name, found in phases.items()))


def _after_the_search(prepared: Prepared, rates: Rates, tokens: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of repair, healing, write and verdict, by the ``rates`` of samples of ``tokens``."""
    space, job, text, phases = prepared.space, prepared.job, prepared.held_out, dict[str, list[tuple[float, float]]]()
    assert space is not None
    layers, each = len(fewest_layers(strategy_of(space.options), space)), rates.run / tokens
    if prepared.fit_text is not None:
        fitted = RepairText(*prepared.fit_text.tokens, prepared.fit_text.every(job.vocabulary))
        method = prepared.settings.repair.chosen
        phases |= repair_seconds(method, fitted, (job.num_layers, layers), (each, rates.word))
    if prepared.lessons is not None:
        lowest = prepared.lessons.healing.positions(layers, layers // 2)[0]  # a search has not begun: cut in the middle
        phases |= prepared.lessons.expected(each, rates.word, layers, lowest)
    if prepared.disk_free is not None:
        phases["write"] = [(prepared.smallest_output * rates.written + _CHECKED_SECONDS, 0.0)]
        if text is not None:
            running = (job.num_layers + layers) * each * text.tokens
            phases["verdict"] = [(running + 2.0 * text.tokens * rates.word, 0.0)]
    return phases


def is_long(prepared: Prepared) -> bool:
    """Whether it takes longer than a probe does, by operations alone."""
    assert prepared.samples is not None
    job, search = prepared.job, sum(one.runs for rounds in prepared.work.values() for one in rounds)
    also = [] if prepared.fit_text is None else [prepared.fit_text.tokens]
    also += [] if prepared.lessons is None else [prepared.lessons.text.tokens]
    runs = prepared.samples.num_tokens * search + job.num_layers * sum(map(sum, also))
    return 2.0 * runs * job.checkpoint.num_parameters / job.num_layers > _SHORT
