"""The order of work of a repair: the source and the pruned stack go up side by side, each weight read once.

The pruned stack's layer that stands for source layers b to e - 1 runs when the source has come to boundary e, whose
hidden states are what it should hand on. So nothing has to be kept of the source but where it is now. Pure: no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from streamcollapse.merge.plan import PlanLayer


@dataclass(frozen=True)
class Step:
    """One layer to run: ``layer`` of the source (``position`` None), or at 0-based ``position`` of the pruned stack;
    that one is to be fitted if it ``is_mended``."""

    layer: PlanLayer
    position: int | None = None
    is_mended: bool = False


@dataclass(frozen=True)
class Climb:
    """``steps`` in order. The pruned stack parts from the source at boundary ``start``."""

    start: int
    steps: tuple[Step, ...]

    @property
    def mended(self) -> list[int]:
        """Positions of the pruned stack that are fitted, bottom first."""
        return [step.position for step in self.steps if step.is_mended and step.position is not None]


def ends(layers: Sequence[PlanLayer], num_layers: int) -> list[int]:
    """For each of ``layers`` the boundary of the source of ``num_layers`` with the hidden states to hand on:
    the one below the base of the next."""
    return [layer.base for layer in layers[1:]] + [num_layers]


def plan_climb(layers: Sequence[PlanLayer], num_layers: int, to_top: bool = False, above: bool = False) -> Climb:
    """How to repair the stack ``layers``: each that stands for several source layers is fitted to the source's hidden
    states above them. Where the lowest source layers are gone, the first that stays stands for them too. ``to_top``:
    the source goes on to its top. ``above``: all layers above the lowest of those are fitted instead."""
    targets = ends(layers, num_layers)
    firsts = [0, *targets[:-1]]
    mended = [end - first > 1 for first, end in zip(firsts, targets, strict=True)]
    if above and any(mended):
        lowest = mended.index(True)
        mended = [position > lowest for position in range(len(layers))]
    if not any(mended):
        return Climb(0, ())
    highest = max(position for position, is_one in enumerate(mended) if is_one)
    same = (position for position, layer in enumerate(layers) if not layer.untouched or mended[position])
    start = next(same)
    steps: list[Step] = []
    position = start
    for number in range(targets[highest]):
        steps.append(Step(PlanLayer(number, {number: 1.0})))
        while position <= highest and targets[position] == number + 1:
            steps.append(Step(layers[position], position, mended[position]))
            position += 1
    if to_top:
        steps += [Step(PlanLayer(number, {number: 1.0})) for number in range(targets[highest], num_layers)]
    return Climb(start, tuple(steps))
