"""What a search is expected to compute, in numbers: candidates, runs of layers, and layers read. Without tensors.

The stacks that a search would evaluate are laid out as the walk lays them out (forward/walk.py), so that what they
share is counted once; which merge is taken, and how many a round of lazy search scores, is an expectation. From that
and what a probe has measured (run/timing.py) comes the time that a job takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from streamcollapse.searches.candidate import Candidate

if TYPE_CHECKING:  # what follows needs torch; listing strategies does not
    from streamcollapse.run.timing import Rates
    from streamcollapse.searches.strategy import SearchSpace


@dataclass(frozen=True)
class Round:
    """What a round is expected to compute: ``candidates`` are evaluated, with ``runs`` of one layer over all samples;
    as many are ``scouted``, with ``scout_runs``. ``visits``: layers that are made ready to run; ``reads``: source
    layers that are read for them. ``judgements``: the usual ones that judging all of them takes as long as, where it is
    not one for each."""

    candidates: float = 0.0
    runs: float = 0.0
    visits: float = 0.0
    reads: float = 0.0
    scouted: float = 0.0
    scout_runs: float = 0.0
    judgements: float | None = None

    def __add__(self, other: Round) -> Round:
        return Round(*(getattr(self, name) + getattr(other, name) for name in _COUNTS))

    def __mul__(self, share: float) -> Round:
        return Round(*(getattr(self, name) * share for name in _COUNTS))

    def seconds(self, rates: Rates) -> float:
        """How long it takes: reading, or computing where that is longer."""
        computing = self.runs * rates.run + self.scout_runs * rates.scout_run + self.visits * rates.ready
        judged = self.candidates if self.judgements is None else self.judgements
        judging = judged * rates.judge + self.scouted * rates.scout_judge
        return max(computing + judging, self.reads * rates.read)


_COUNTS = [field.name for field in fields(Round) if field.name != "judgements"]

Work = Mapping[str, Sequence[Round]]  # the rounds of each phase


def swept(candidates: Sequence[Candidate], room: int, by_scout: bool = False) -> Round:
    """The sweeps that evaluate ``candidates``, at most ``room`` in each."""
    from streamcollapse.forward.walk import Stack, schedule

    runs = visits = reads = 0
    for start in range(0, len(candidates), room):
        found = schedule([Stack(one.layers, one.start) for one in candidates[start : start + room]])
        runs += sum(len(visit.steps) for visit in found)
        visits += len(found)
        reads += len({source for visit in found for source in visit.layer.mix})
    if by_scout:
        return Round(visits=visits, reads=reads, scouted=len(candidates), scout_runs=runs)
    return Round(len(candidates), runs, visits, reads)


def layers_to_go(space: SearchSpace) -> int:
    """How many layers a search takes away; where no target says so a fifth, which is a guess."""
    if space.target.is_set:
        return space.num_layers - space.target.fewest()
    return max(space.num_layers // 5, 1)
