"""How long a job will take: what it computes, phase by phase, times what a probe of the machine says of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from streamcollapse.forward.batches import make_batches
from streamcollapse.progress import TimeExpected
from streamcollapse.repair.climb import plan_climb
from streamcollapse.run.repair_needs import Cuts, RepairText, repair_seconds
from streamcollapse.run.samples import Samples
from streamcollapse.run.timing import Rates, probe
from streamcollapse.searches.exchange import exchange_rounds, is_exchanging
from streamcollapse.searches.registry import strategy_of
from streamcollapse.searches.rescale import scale_rounds
from streamcollapse.searches.strategy import fewest_layers
from streamcollapse.searches.work import Round
from streamcollapse.settings.catalogue import EFFORTS, METRICS

if TYPE_CHECKING:
    from streamcollapse.jobs.prepare import Prepared

Phases = dict[str, list[tuple[float, float]]]  # as TimeExpected has them

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


def expected_time(prepared: Prepared) -> TimeExpected | None:
    """Of each phase of ``prepared``, by a probe of a few seconds; None where nothing runs through the layers."""
    samples, space, options = prepared.samples or _read_with(prepared), prepared.space, prepared.options
    if samples is None:
        return None
    place = Path.cwd() if prepared.out is None else prepared.out.parent
    judged = ("kl", EFFORTS["quick"]) if space is None else (space.options.metric, EFFORTS[space.options.effort])
    needs_words = _judges(prepared) or prepared.lessons is not None or prepared.fit_text is not None
    rates = probe(prepared.job, samples, prepared.memory, judged, place, needs_words)
    phases: Phases = {} if options is None else _search(prepared, rates)
    phases |= _after_the_search(prepared, rates, samples.num_tokens)
    if options is None:  # what is not in memory yet is read by what comes first
        first = next(iter(phases))
        phases[first] = [(rates.first, 0.0), *phases[first]]
    return TimeExpected(tuple((name, tuple(found)) for name, found in phases.items()))


def _judges(prepared: Prepared) -> bool:
    return prepared.held_out is not None and prepared.disk_free is not None


def _read_with(prepared: Prepared) -> Samples | None:
    """A call of what goes through the layers where there is no search."""
    if prepared.fit_text is not None:
        return Samples(prepared.fit_text.batches[0][:1], "")
    if prepared.lessons is not None:
        return Samples(prepared.lessons.text.calls()[0][:1], "")
    if prepared.held_out is None:
        return None
    ids = [window.token_ids for window in prepared.held_out.windows]
    return Samples(make_batches(ids, prepared.job.call_tokens)[:1], "")


def _search(prepared: Prepared, rates: Rates) -> Phases:
    """Seconds of the reference pass and of what comes after it, up to the plan."""
    samples, job = prepared.samples, prepared.job
    assert samples is not None
    phases = {
        name: [(one.seconds(rates), one.candidates + one.scouted) for one in rounds]
        for name, rounds in prepared.work.items()
    }
    saved = 0 if prepared.out is None else (job.num_layers + 2) * samples.num_tokens * job.hidden_size
    ((seconds, _),) = phases["reference"]
    seconds = max(seconds, rates.first) + saved * job.placement.dtype.itemsize * rates.written
    begin = rates.begin if any(count for rounds in phases.values() for _, count in rounds) else 0.0
    return phases | {"reference": [(seconds + begin, 0.0)]}


def _stack(prepared: Prepared) -> Cuts:
    """What is left, as far as it is known: of a search that has not begun, a stack that is cut in the middle."""
    job, plan, space = prepared.job, prepared.plan, prepared.space
    if plan is not None:
        climb = plan_climb(plan.layers, job.num_layers)
        return Cuts(job.num_layers, plan.num_layers, climb.start, len(climb.mended))
    assert space is not None
    layers = len(fewest_layers(strategy_of(space.options), space))
    return Cuts(job.num_layers, layers, layers // 2)


def _after_the_search(prepared: Prepared, rates: Rates, tokens: int) -> Phases:
    """Seconds of repair, healing, write and verdict, by the ``rates`` of samples of ``tokens``."""
    job, text, stack, each = prepared.job, prepared.held_out, _stack(prepared), rates.run / tokens
    phases: Phases = {}
    if prepared.fit_text is not None:
        fitted = RepairText(*prepared.fit_text.tokens, prepared.fit_text.every(job.vocabulary))
        phases |= repair_seconds(
            prepared.settings.repair.chosen, fitted, stack, (each, rates.word), prepared.memory.kept == "graphs"
        )
    if prepared.lessons is not None:
        lowest = prepared.lessons.healing.positions(stack.kept, stack.lowest)[0]
        phases |= prepared.lessons.expected(each, rates.word, stack.kept, lowest)
    if prepared.disk_free is not None:
        phases["write"] = [(prepared.smallest_output * rates.written + _CHECKED_SECONDS, 0.0)]
    if _judges(prepared) and text is not None:
        running = (job.num_layers + stack.kept) * each * text.tokens
        phases["verdict"] = [(running + 2.0 * text.tokens * rates.word, 0.0)]
    return phases


def is_long(prepared: Prepared) -> bool:
    """Whether it takes longer than a probe does, by operations alone."""
    job, samples, runs = prepared.job, prepared.samples, 0.0
    if samples is not None:
        runs = samples.num_tokens * sum(one.runs for rounds in prepared.work.values() for one in rounds)
    also = [] if prepared.fit_text is None else [prepared.fit_text.tokens]
    also += [] if prepared.lessons is None else [prepared.lessons.text.tokens]
    runs += job.num_layers * sum(map(sum, also))
    return 2.0 * runs * job.checkpoint.num_parameters / job.num_layers > _SHORT
