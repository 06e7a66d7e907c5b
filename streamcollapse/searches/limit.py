"""How far a search may go by what it does to text that it does not see."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from streamcollapse.forward.perplexity import streamed_perplexities
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.run.held_out import HeldOut
from streamcollapse.run.opened import Run

TOGETHER = 4  # sizes of a result that are judged in one walk


@dataclass(frozen=True)
class LossLimit:
    """The loss on ``text`` may rise by ``most`` nats per token; ``merge_norms`` as in the plan."""

    run: Run
    text: HeldOut
    most: float
    merge_norms: bool

    @cached_property
    def _before(self) -> float:
        return self._losses([original_layers(self.run.job.num_layers)])[0]

    def rises(self, stacks: Sequence[tuple[PlanLayer, ...]]) -> list[float]:
        """By how much the loss rises where the layers are each of ``stacks``, in nats per token."""
        return [loss - self._before for loss in self._losses(stacks)]

    def refuses(self, layers: tuple[PlanLayer, ...]) -> str | None:
        """Why a search may not go on to ``layers``; None where it may."""
        (rise,) = self.rises([layers])
        if rise <= self.most:
            return None
        by = f"by {rise:.3f} nats" if math.isfinite(rise) else "to infinity"
        return f"the loss on held-out text would rise {by}, above {self.most:g}"

    def smallest(self, count: int, layers_of: Callable[[int], tuple[PlanLayer, ...]]) -> int:
        """The fewest layers, from ``count`` - 1 down, up to which every result is within the limit; ``count`` where
        none is. ``layers_of``: the result for a number of layers."""
        for first in range(count - 1, 0, -TOGETHER):
            sizes = range(first, max(first - TOGETHER, 0), -1)
            rises = self.rises([layers_of(size) for size in sizes])
            for size, rise in zip(sizes, rises, strict=True):
                if rise > self.most:
                    return size + 1
        return 1

    def _losses(self, stacks: Sequence[tuple[PlanLayer, ...]]) -> list[float]:
        job = self.run.job
        norms, calls = [self.merge_norms] * len(stacks), job.call_tokens
        found = streamed_perplexities(self.run.model, stacks, norms, self.text.windows, job.vocabulary, calls)
        return [one.nll for one in found]
