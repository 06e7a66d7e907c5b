"""How much does a search read? Layers and decisions only, no tensors, through the search's own code.

Question   Layers that reference pass, search and write read, in multiples of the model ("model reads"), for models of
           32 to 126 layers, with nothing and with the top R source layers resident, beside a full pass per candidate
           and a suffix per candidate.
Method     Every C from 2 to 8 and every I from 1 to 4. Outcomes of candidates are drawn (accept rate p), come in runs,
           follow a fixed pattern, or are chosen by an adversary who knows the odds or the candidates of the sweep.
           SearchState, likely_states and schedule are the ones that a real search uses. Similarities are unknown, so
           the odds have nothing but the outcomes to go by. Every layer counts as the same size; embedding and head are
           left out.
Model      Resident layers are read by the reference pass and never again. A merged layer of several sources reads all
           of them; once accepted, the next sweep that builds it keeps it (unless all its sources are resident), and
           from then on it costs one layer, when written too. A merge of merged layers goes back to the sources; with
           --sums it is told what a job would read that kept float32 sums of accepted layers beside them and built on
           those instead (two layers each at 16 bits; not what StreamCollapse does, and not bit for bit the same).
           The plainer searches are favoured: to them a layer of the stack counts as one, whatever it is mixed from.
           The targets with resident layers are checked for models of up to 80 layers.

    python benchmarks/simulate_reads.py [--nodes 512] [--resident 20] [--seeds 2] [--layers 32 40 80 126] [--no-keep]
                                        [--rules sequential mean] [--sums] [--workers N] [--save FILE]

The last line of stdout is one JSON document. The exit code is 1 where the rule ``sequential`` misses a target; other
rules are told beside the same targets (docs/decisions/0011-reading-less.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from streamcollapse.forward.walk import Stack, schedule
from streamcollapse.merge.plan import PlanLayer, StackKey, stack_key
from streamcollapse.merge.record import Decision
from streamcollapse.searches.algorithm1 import SearchState
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.lookahead import AcceptModel, Depth, likely_states
from streamcollapse.searches.lookahead import Outcome as Known
from streamcollapse.settings.search import SearchOptions

WHOLE_GRID = (9.0, 6.5)  # model reads of a job: nothing resident, some layers resident
RESTRICTED_GRID = (5.5, 3.5)  # the same for accept rates of at least RATE with a C of at least FEWEST
RATE, FEWEST = 0.3, 3
JUDGED = "sequential"  # the rule of laco where none is given
SUM_LAYERS = 2  # that a float32 sum of 16-bit layers is as large as
LARGEST_RESIDENT = 80  # layers of the largest model for which the targets with resident layers are meant
PATTERNS = ("A", "R", "AR", "ARR", "AAR", "AAAARRRR", "A" * 8 + "R" * 16, "AR" * 8 + "RRAA" * 4)


@dataclass(frozen=True)
class Moment:
    """What an outcome may depend on besides the candidate: decisions before it, the odds, what has been evaluated."""

    step: int
    odds: AcceptModel
    evaluated: set[StackKey]


class Outcome(Protocol):
    """Whether a candidate is accepted."""

    def __call__(self, state: SearchState, moment: Moment) -> bool: ...


class Drawn:
    """Accepted with probability ``p``, independently for every pointer."""

    def __init__(self, p: float, seed: int) -> None:
        draw = random.Random(f"{p}:{seed}")
        self._accepted = [draw.random() < p for _ in range(1000)]

    def __call__(self, state: SearchState, moment: Moment) -> bool:
        return self._accepted[state.pointer]


class Runs:
    """Accepts and rejects in runs of random length, ``mean`` on average."""

    def __init__(self, mean: float, seed: int) -> None:
        draw = random.Random(f"runs {mean}:{seed}")
        self._accepted = [draw.random() < 0.5]
        for _ in range(1000):
            self._accepted.append(self._accepted[-1] != (draw.random() < 1.0 / mean))

    def __call__(self, state: SearchState, moment: Moment) -> bool:
        return self._accepted[moment.step]


class Patterned:
    """A fixed pattern of ``A`` and ``R``, over and over."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def __call__(self, state: SearchState, moment: Moment) -> bool:
        return self._pattern[moment.step % len(self._pattern)] == "A"


def contrary(state: SearchState, moment: Moment) -> bool:
    """An adversary: whatever the odds think less likely."""
    return moment.odds.forecast().accept < 0.5


class RunBreaker:
    """An adversary: repeats an outcome until the odds are sure of it to ``confidence``, then breaks the run."""

    def __init__(self, confidence: float) -> None:
        self._confidence = confidence

    def __call__(self, state: SearchState, moment: Moment) -> bool:
        odds = moment.odds
        if not odds.decisions:
            return False
        last, accept = odds.decisions[-1].accepted, odds.forecast().accept
        return last != ((accept if last else 1.0 - accept) >= self._confidence)


class Evasive:
    """An adversary: leaves the evaluated part of the tree by the shortest way; ``preferred`` where both are as long."""

    def __init__(self, preferred: bool) -> None:
        self._preferred = preferred

    def __call__(self, state: SearchState, moment: Moment) -> bool:
        order = (self._preferred, not self._preferred)
        ways = {accepted: _settled(_after(state, accepted), moment) for accepted in order}
        return min(ways, key=lambda accepted: ways[accepted])


def _settled(state: SearchState, moment: Moment) -> int:
    """The fewest decisions that are settled from ``state`` on: level by level to the first candidate to evaluate."""
    level = [state]
    for depth in itertools.count():
        for reached in level:
            candidate = reached.candidate()
            if candidate is not None and stack_key(candidate.layers) not in moment.evaluated:
                return depth
        level = [_after(reached, accepted) for reached in level if reached.candidate() for accepted in (True, False)]
        if not level:
            return sys.maxsize  # nothing is left to evaluate
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Scenario:
    """Where outcomes come from; ``rate`` is the accept rate, None where it has to be counted."""

    name: str
    rate: float | None
    outcome: Outcome


def scenarios(seeds: int) -> Iterator[Scenario]:
    """All of them, the random ones ``seeds`` times."""
    for seed in range(seeds):
        for p in (0.1, 0.3, 0.5, 0.7, 0.9):
            yield Scenario(f"rate {p} seed {seed}", p, Drawn(p, seed))
        for mean in (4, 10):
            yield Scenario(f"runs of {mean} seed {seed}", None, Runs(mean, seed))
    for pattern in PATTERNS:
        yield Scenario(f"pattern {pattern}", pattern.count("A") / len(pattern), Patterned(pattern))
    yield Scenario("contrary", None, contrary)
    for confidence in (0.6, 0.7, 0.8, 0.9):
        yield Scenario(f"runs broken at {confidence}", None, RunBreaker(confidence))
    for preferred in (False, True):
        yield Scenario(f"evasive, {'accept' if preferred else 'reject'} preferred", None, Evasive(preferred))


@dataclass(frozen=True)
class Run:
    """Model reads of one job: with nothing and with some layers resident, and what plainer searches would read."""

    job: tuple[float, float]
    full_pass_each: float
    suffix_each: float
    sweeps: int
    accept_rate: float


Unit = int | str | StackKey  # a source layer, a sum, a mixed layer that is kept


class Reader:
    """Counts the layers that sweeps and the write phase read with the top ``resident`` source layers in memory."""

    def __init__(self, num_layers: int, resident: int, keep: bool) -> None:
        self._on_disk = range(num_layers - resident)
        self._keep = keep
        self._kept: set[StackKey] = set()
        self.read = num_layers  # the reference pass

    def sweep(self, visited: Iterable[PlanLayer], accepted: set[StackKey]) -> None:
        """Read what ``visited`` need, each source layer once; keep the ``accepted`` mixed layers among them."""
        units: dict[Unit, int] = {}
        built = []
        for layer in visited:
            key = stack_key((layer,))
            if key in self._kept:
                units[key] = 1
            elif parts := self._parts(layer):
                units |= parts
                if self._keep and len(layer.mix) > 1 and key in accepted:
                    built.append(layer)
        for layer in built:
            self._keep_layer(layer)
        self.read += sum(units.values())

    def write(self, layers: Iterable[PlanLayer]) -> None:
        """Read what the written ``layers`` need, one after the other."""
        for layer in layers:
            self.read += 1 if stack_key((layer,)) in self._kept else sum(self._parts(layer).values())

    def _parts(self, layer: PlanLayer) -> dict[Unit, int]:
        """What building ``layer`` reads, in layers."""
        return {source: 1 for source in layer.mix if source in self._on_disk}

    def _keep_layer(self, layer: PlanLayer) -> None:
        self._kept.add(stack_key((layer,)))


class SumReader(Reader):
    """What would be read if merges of merged layers were built on float32 sums, kept beside the rounded layers."""

    def __init__(self, num_layers: int, resident: int, keep: bool) -> None:
        super().__init__(num_layers, resident, keep)
        self._sums: dict[frozenset[int], str] = {}  # by their sources on disk, largest first

    def _parts(self, layer: PlanLayer) -> dict[Unit, int]:
        missing = super()._parts(layer)
        parts: dict[Unit, int] = {}
        for sources, name in self._sums.items():
            if sources <= missing.keys():
                parts[name] = SUM_LAYERS
                missing = dict.fromkeys(missing.keys() - sources, 1)
        return parts | missing

    def _keep_layer(self, layer: PlanLayer) -> None:
        super()._keep_layer(layer)
        sources = frozenset(source for source in layer.mix if source in self._on_disk)
        if len(sources) > SUM_LAYERS:
            self._sums[sources] = f"sum {len(self._sums)}"
            self._sums = dict(sorted(self._sums.items(), key=lambda item: -len(item[0])))


def _after(state: SearchState, accepted: bool) -> SearchState:
    return state.after(state.candidate() if accepted else None)


class Simulation:
    """One search through the code of the real one; ``readers`` count what it reads, each on its own terms."""

    def __init__(self, state: SearchState, outcome: Outcome, nodes: int, readers: Sequence[Reader]) -> None:
        self._state, self._outcome, self._nodes, self._readers = state, outcome, nodes, readers
        self._odds = AcceptModel(state.options.threshold)
        self._decided: dict[StackKey, bool] = {}
        self._evaluated: set[StackKey] = set()
        self._accepted: set[StackKey] = set()  # merged layers
        self.full = self.suffix = self.sweeps = 0

    def run(self) -> SearchState:
        """Search and write; the state at the end."""
        while candidate := self._state.candidate():
            if stack_key(candidate.layers) not in self._evaluated:
                self._sweep()
            self.full += len(candidate.layers)
            self.suffix += len(candidate.layers) - candidate.position
            accepted = self._decide(self._state, candidate)
            self._odds.learn(Decision(candidate.pointer, candidate.merged, None, accepted))
            if accepted:
                self._accepted.add(stack_key((candidate.merged_layer,)))
            self._state = _after(self._state, accepted)
        for reader in self._readers:
            reader.write(self._state.layers)
        return self._state

    @property
    def accept_rate(self) -> float:
        decisions = self._odds.decisions
        return sum(decision.accepted for decision in decisions) / max(len(decisions), 1)

    def _decide(self, state: SearchState, candidate: Candidate) -> bool:
        key = stack_key(candidate.layers)
        if key not in self._decided:
            moment = Moment(len(self._odds.decisions), self._odds, self._evaluated)
            self._decided[key] = self._outcome(state, moment)
        return self._decided[key]

    def _known(self, state: SearchState) -> Known | None:
        candidate = state.candidate()
        assert candidate is not None
        if stack_key(candidate.layers) not in self._evaluated:
            return None
        return (candidate if self._decide(state, candidate) else None,)

    def _sweep(self) -> None:
        states = likely_states(self._state, self._odds, Depth(self._nodes), self._known)
        candidates = [candidate for state in states if (candidate := state.candidate())]
        self._evaluated.update(stack_key(candidate.layers) for candidate in candidates)
        visits = schedule([Stack(candidate.layers, candidate.position) for candidate in candidates])
        for reader in self._readers:
            reader.sweep([visit.layer for visit in visits], self._accepted)
        self.sweeps += 1


def simulate(num_layers: int, options: SearchOptions, outcome: Outcome, settings: argparse.Namespace) -> Run:
    """One job, with nothing and with ``settings.resident`` layers resident: its sweeps are the same."""
    kind = SumReader if settings.sums else Reader
    readers = [kind(num_layers, resident, settings.keep) for resident in (0, settings.resident)]
    simulation = Simulation(SearchState.start(num_layers, options), outcome, settings.nodes, readers)
    layers = simulation.run().layers
    ends = num_layers + sum(len(layer.mix) for layer in layers)  # reference pass and write
    return Run(
        (readers[0].read / num_layers, readers[1].read / num_layers),
        (ends + simulation.full) / num_layers,
        (ends + simulation.suffix) / num_layers,
        simulation.sweeps,
        simulation.accept_rate,
    )


Where = dict[str, Any]
Labelled = tuple[Where, bool, Run]  # what it is, whether it lies in the restricted grid, what it read


def run_of(settings: argparse.Namespace, num_layers: int, rule: str, what: tuple[int, int, int]) -> Labelled:
    """The run of C, I and the scenario of that number."""
    c, i, number = what
    scenario = next(itertools.islice(scenarios(settings.seeds), number, None))
    options = SearchOptions(layers_per_merge=c, interval=i, rule=rule)
    run = simulate(num_layers, options, scenario.outcome, settings)
    rate = run.accept_rate if scenario.rate is None else scenario.rate
    return {"C": c, "I": i, "outcomes": scenario.name}, c >= FEWEST and rate >= RATE, run


def summary(
    runs: Sequence[tuple[dict[str, Any], Run]], resident: int, targets: tuple[float, float]
) -> list[dict[str, Any]]:
    """Median and worst job, with nothing and with ``resident`` layers resident."""
    rows = []
    for number, (layers, target) in enumerate(zip((0, resident), targets, strict=True)):
        where, worst = max(runs, key=lambda item: item[1].job[number])
        median = statistics.median(run.job[number] for _, run in runs)
        values = {"median": round(median, 2), "worst": round(worst.job[number], 2)}
        rows.append({"resident": layers, **values, "worst_at": where, "worst_sweeps": worst.sweeps, "target": target})
    return rows


def grid(num_layers: int, rule: str, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model and rule: whole and restricted grid."""
    every = itertools.product(range(2, 9), range(1, 5), range(len(list(scenarios(settings.seeds)))))
    with ProcessPoolExecutor(settings.workers) as pool:
        runs = list(pool.map(partial(run_of, settings, num_layers, rule), every, chunksize=8))
    rows = []
    for name, targets, wanted in (("whole", WHOLE_GRID, False), ("restricted", RESTRICTED_GRID, True)):
        chosen = [(where, run) for where, restricted, run in runs if restricted or not wanted]
        plainer = {
            "suffix_each": round(statistics.median(run.suffix_each for _, run in chosen), 2),
            "full_pass_each": round(statistics.median(run.full_pass_each for _, run in chosen), 2),
        }
        for row in summary(chosen, settings.resident, targets):
            if row["resident"] and num_layers > LARGEST_RESIDENT:
                row["target"] = None
            rows.append({"layers": num_layers, "rule": rule, "grid": name, "runs": len(chosen), **row, **plainer})
    return rows


def missed(row: dict[str, Any]) -> bool:
    """Whether a target was set and the worst run of ``row`` reads more."""
    return row["target"] is not None and bool(row["worst"] > row["target"])


def line(row: dict[str, Any]) -> str:
    """``row`` for people."""
    at, above = row["worst_at"], f"  above {row['target']}" if missed(row) else ""
    return (
        f"{row['layers']:>4} layers  {row['rule']:<10} {row['grid']:<10} {row['resident']:>2} resident  "
        f"median {row['median']:5.2f}  worst {row['worst']:5.2f} (C={at['C']}, I={at['I']}, {at['outcomes']})  "
        f"suffix each {row['suffix_each']:5.2f}  full pass each {row['full_pass_each']:5.2f}{above}"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=512, help="candidates in a sweep")
    parser.add_argument("--resident", type=int, default=20, help="top source layers in memory, beside none")
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="accepted mixed layers")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 40, 80, 126])
    parser.add_argument("--rules", nargs="+", default=["sequential", "mean"])
    parser.add_argument("--sums", action="store_true", help="what float32 sums of accepted layers would save")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--save", type=Path, metavar="FILE", help="the JSON document, indented")
    return parser.parse_args()


def main() -> None:
    settings = parsed()
    rows = []
    for rule, num_layers in itertools.product(settings.rules, settings.layers):
        for row in grid(num_layers, rule, settings):
            rows.append(row)
            print(line(row), flush=True)
    told = {key: value for key, value in vars(settings).items() if key not in ("save", "workers")}
    document = {"benchmark": "simulate_reads", "date": date.today().isoformat(), **told, "rows": rows}
    if settings.save is not None:
        settings.save.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    sys.exit(any(row["rule"] == JUDGED and missed(row) for row in rows))


if __name__ == "__main__":
    main()
