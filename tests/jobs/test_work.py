"""What a search is expected to compute against what it does, counted; and what that comes to in seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamcollapse import Calibration, Compute, SearchOptions, Streaming, search
from streamcollapse.jobs.apply import run_apply
from streamcollapse.jobs.prepare import Prepared, prepare_apply, prepare_prune, prepare_search
from streamcollapse.jobs.prune import run_prune
from streamcollapse.jobs.search import run_search
from streamcollapse.progress import CandidatesDone, Event, LayerDone, PhaseStarted, RoundStarted
from streamcollapse.run.timing import Rates
from streamcollapse.searches.work import Round
from streamcollapse.settings.heal import AlsoHeal
from streamcollapse.settings.run import Judging, Repair, RunSettings

GREEDY: dict[str, Any] = {"strategy": "greedy", "effort": "thorough", "rescale": False, "metric": "cosine"}


class _Counted:
    """Candidates of each round, and layers that were run through, by phase; bytes that were read, by the meter."""

    def __init__(self, source: Path, options: SearchOptions, together: int = 64) -> None:
        self.candidates: dict[str, list[int]] = {}
        self.layers: Counter[str] = Counter()
        self._phase = ""
        streaming = Streaming(lookahead=together, prefetch=0)
        settings = RunSettings(Compute("cpu", "float32"), Calibration("sentences"), streaming)
        prepared = prepare_search(source, options, settings, listener=self._listen)
        self.prepared: Prepared = replace(prepared, memory=replace(prepared.memory, resident_layers=0))
        run_search(self.prepared)
        layer = self.prepared.inspection.layer_bytes[0]
        self.reads = {one.name: one.bytes_read // layer for one in self.prepared.job.meter.phases}

    def _listen(self, event: Event) -> None:
        match event:
            case PhaseStarted(name, _):
                self._phase = name
                self.candidates[name] = []
            case RoundStarted():
                self.candidates[self._phase].append(0)
            case CandidatesDone(count, _):
                self.candidates[self._phase][-1:] = [sum(self.candidates[self._phase][-1:]) + count]
            case LayerDone():
                self.layers[self._phase] += 1

    def expected(self, phase: str) -> Round:
        return sum(self.prepared.work[phase], Round())


@pytest.mark.parametrize("rule", ["first", "mean"])
def test_a_round_of_thorough_greedy_is_what_was_expected(llama: Path, rule: str) -> None:
    found = _Counted(llama, SearchOptions(target_layers=7, rule=rule, **GREEDY))
    expected = found.expected("search")
    assert (found.candidates["search"], found.layers["search"]) == ([7], expected.visits)
    assert expected.candidates == 7
    assert found.reads["search"] == expected.reads
    assert found.layers["reference"] == found.expected("reference").visits == 8
    assert found.reads["reference"] == 8


def test_rounds_of_thorough_greedy_have_the_candidates_that_were_expected(llama: Path) -> None:
    found = _Counted(llama, SearchOptions(target_layers=4, lowest=2, **GREEDY))
    assert found.candidates["search"] == [one.candidates for one in found.prepared.work["search"]] == [6, 5, 4, 3]
    # where merges are made is not known before
    assert found.layers["search"] == pytest.approx(found.expected("search").visits, rel=0.3)


@pytest.mark.parametrize("strategy", ["block-influence", "angular"])
def test_one_pass_is_expected_to_be_one(llama: Path, strategy: str) -> None:
    found = _Counted(llama, SearchOptions(strategy=strategy, target_layers=6))
    assert found.expected("search") == Round()
    assert found.layers == {"reference": 8}


def test_groups_from_the_top_are_what_was_expected(llama: Path) -> None:
    found = _Counted(llama, SearchOptions(strategy="rule-based", layers_per_merge=2, interval=1))
    expected = found.expected("search")
    assert found.candidates["search"] == [expected.candidates]
    assert found.layers["search"] == expected.visits


@pytest.mark.parametrize(("threshold", "share"), [(1.0, 1.5), (-1.0, 0.5)])
def test_layer_collapse_lies_between_none_and_all_accepted(llama: Path, threshold: float, share: float) -> None:
    options = SearchOptions(strategy="laco", layers_per_merge=2, interval=2, threshold=threshold)
    found = _Counted(llama, options, together=1)
    (count,) = found.candidates["search"]
    expected = found.expected("search").candidates
    assert min(expected, share * expected) <= count <= max(expected, share * expected)


def test_lazy_rounds_are_bounded_and_scouted_once(llama: Path) -> None:
    options = SearchOptions(strategy="greedy", target_layers=5, rescale=True)
    found = _Counted(llama, options)
    first, *later = found.prepared.work["search"]
    assert found.prepared.samples is not None
    assert first.scouted == (0 if found.prepared.samples.longest <= 64 else 7)
    assert len(found.candidates["search"]) == 3 == len(later) + 1
    for counted, one in zip(found.candidates["search"], found.prepared.work["search"], strict=True):
        assert 1 / 3 <= counted / (one.candidates + one.scouted) <= 3
    scales = found.prepared.work["scales"]
    assert found.candidates["scales"][0] == pytest.approx(scales[0].candidates + scales[0].scouted, abs=5)


def test_scales_step_by_step_are_what_was_expected(llama: Path) -> None:
    found = _Counted(llama, SearchOptions(**GREEDY | {"rescale": True}, target_layers=6))
    expected = found.prepared.work["scales"][0]
    # all up and down, and what is tried together: the stack itself is known from the search
    assert 12 <= sum(found.candidates["scales"][:1]) <= 12 + 3
    assert expected.candidates == 1 + 12 + 3


def test_seconds_are_those_of_computing_or_of_reading() -> None:
    rates = Rates(
        run=2.0,
        judge=5.0,
        scout_run=0.5,
        scout_judge=1.0,
        ready=0.25,
        read=3.0,
        first=0.0,
        begin=0.0,
        word=0.0,
        written=0.0,
    )
    one = Round(candidates=2, runs=10, visits=4, reads=4, scouted=3, scout_runs=6)
    assert one.seconds(rates) == 2 * 5 + 10 * 2 + 4 * 0.25 + 3 * 1 + 6 * 0.5
    assert (one + one).seconds(rates) == 2 * one.seconds(rates) == (one * 2.0).seconds(rates)
    assert replace(one, reads=20).seconds(rates) == 60
    assert replace(one, judgements=8).seconds(rates) == one.seconds(rates) + 6 * 5


def test_healing_at_once_is_in_the_times_and_needs(llama: Path, tmp_path: Path) -> None:
    also = AlsoHeal(True, tokens=2048)
    settings = RunSettings(Compute("cpu", "float32"), Calibration("sentences"), repair=Repair("none"), also_heal=also)
    prepared = prepare_prune(llama, tmp_path / "out", SearchOptions(target_layers=6), settings)
    assert {"teacher", "heal"} < {need.phase for need in prepared.memory.needs}
    timed = prepared.timed()
    assert timed.expected is not None
    assert timed.expected.seconds["heal"] > timed.expected.seconds["teacher"] > 0


@pytest.mark.parametrize("method", ["magnitude", "linear", "local", "auto"])
def test_a_repair_is_in_the_times_by_its_phases(method: str, llama: Path, tmp_path: Path) -> None:
    """Those that it runs through, and no other."""
    settings = RunSettings(Compute("cpu", "float32"), Calibration("sentences"), repair=Repair(method, tokens=2048))
    prepared = prepare_prune(llama, tmp_path / "out", SearchOptions(target_layers=6), settings)
    timed = prepared.timed(even_if_short=True)
    assert timed.expected is not None
    run_prune(prepared)
    seconds, phases = timed.expected.seconds, [phase.name for phase in prepared.job.meter.phases]
    ours = [name for name in seconds if name in ("repair", "end to end", "repair check")]
    assert ours == list(dict.fromkeys(name for name in phases if name in ("repair", "end to end", "repair check")))
    assert all(seconds[name] > 0 for name in ours)


@pytest.mark.parametrize("method", ["none", "linear", "auto"])
def test_writing_a_plan_is_timed_by_the_phases_that_it_runs_through(method: str, llama: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    plan = search(llama, SearchOptions(strategy="block-influence", target_layers=6))
    settings = RunSettings(Compute("cpu", "float32"), repair=Repair(method, tokens=2048))
    prepared = prepare_apply(llama, plan, tmp_path / "out", settings, told.append)
    assert prepared.timed(even_if_short=False).expected is None, "no longer than a probe"
    timed = prepared.timed()
    assert timed.expected is not None
    run_apply(timed)
    assert timed.expected in told
    seconds = timed.expected.seconds
    assert list(seconds) == list(dict.fromkeys(phase.name for phase in timed.job.meter.phases))
    assert all(value > 0 for value in seconds.values())


def test_writing_what_is_healed_is_timed_as_well(llama: Path, tmp_path: Path) -> None:
    plan = search(llama, SearchOptions(strategy="block-influence", target_layers=6))
    settings = RunSettings(Compute("cpu", "float32"), also_heal=AlsoHeal(True, tokens=2048))
    timed = prepare_apply(llama, plan, tmp_path / "out", settings).timed()
    assert timed.expected is not None
    assert list(timed.expected.seconds) == ["teacher", "heal", "write", "verdict"]
    settings = replace(settings, also_heal=AlsoHeal(), judging=Judging(verdict=False))
    assert prepare_apply(llama, plan, tmp_path / "out", settings).timed().expected is None, "nothing runs"


def test_a_job_that_is_timed_says_how_long_each_phase_takes(llama: Path, tmp_path: Path) -> None:
    settings = RunSettings(Compute("cpu", "float32"), Calibration("sentences"), repair=Repair("none"))
    options = SearchOptions(target_layers=6, rescale=True)
    prepared = prepare_prune(llama, tmp_path / "out", options, settings)
    assert prepared.expected is None
    assert prepared.timed(even_if_short=False).expected is None, "no longer than a probe"
    timed = prepared.timed()
    assert timed.expected is not None
    assert list(timed.expected.seconds) == ["reference", "search", "exchanges", "scales", "write", "verdict"]
    assert all(seconds > 0 for seconds in timed.expected.seconds.values())
    assert timed.to_json()["expected_seconds"] == timed.expected.seconds
    assert timed.job.meter.phases == [], "what the probe read is not the job's"
    assert list(tmp_path.iterdir()) == []
