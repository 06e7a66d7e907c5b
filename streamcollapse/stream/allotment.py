"""How a budget of memory is spent.

First what cannot be done without is counted, at the smallest setting; what does not fit is refused before a weight is
read. What is then left goes to hidden states kept in memory instead of on the disk, to more candidates in a sweep, and
to layers that stay resident, in this order: the first two cost little, the last can take everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from streamcollapse.errors import BudgetError
from streamcollapse.settings.run import Streaming
from streamcollapse.stream.budget import Budget
from streamcollapse.stream.needs import (
    MOST_CANDIDATES,
    Allotment,
    Memory,
    Need,
    Work,
    needs_on_cpu,
    needs_on_device,
    peak_bytes,
)
from streamcollapse.units import format_bytes

_WHOLE_MIB = 1 << 20


def least(work: Work, streaming: Streaming, on_device: bool) -> Allotment:
    """The smallest setting that ``streaming`` allows: nothing resident, boundaries on the disk."""
    choice = Allotment(streaming.prefetch, streaming.lookahead or 1)
    needs = needs_on_device(work, choice) if on_device else needs_on_cpu(work, choice)
    return replace(choice, needs=tuple(needs))


def allot(work: Work, budget: Budget, streaming: Streaming) -> Allotment:
    """Spend ``budget``. Raises BudgetError, with the smallest budget that would do, where it is too small."""
    on_device = budget.vram is not None
    list_needs = needs_on_device if on_device else needs_on_cpu
    choice = least(work, streaming, on_device)
    _refuse(choice.needs, budget)

    def fits(other: Allotment, share: float = 1.0) -> bool:
        """Whether ``other`` takes at most ``share`` of what ``choice`` leaves."""
        before, after = list_needs(work, choice), list_needs(work, other)
        limits: list[tuple[Memory, int]] = [("ram", budget.ram), ("vram", budget.vram or 0)]
        return all(
            peak_bytes(after, m) <= peak_bytes(before, m) + share * (limit - peak_bytes(before, m))
            for m, limit in limits
        )

    if fits(in_memory := replace(choice, spill=False), 0.5):
        choice = in_memory
    if streaming.lookahead is None:
        more = _largest(MOST_CANDIDATES, lambda n: fits(replace(choice, candidates=n), 0.25))
        choice = replace(choice, candidates=max(more, 1))
    stay = _largest(work.num_layers, lambda n: fits(replace(choice, resident_layers=n)))
    slots = (work.window + choice.prefetch) * work.layer
    left = (budget.ram if not on_device else budget.vram or 0) - peak_bytes(
        list_needs(work, replace(choice, resident_layers=stay)), "vram" if on_device else "ram"
    )
    choice = replace(choice, resident_layers=stay, from_cache=stay < work.num_layers, slot_bytes=slots + max(left, 0))
    return replace(choice, needs=tuple(list_needs(work, choice)), budget=budget)


def _refuse(needs: Sequence[Need], budget: Budget) -> None:
    limits: list[tuple[Memory, int | None, str]] = [("ram", budget.ram, "memory"), ("vram", budget.vram, "GPU memory")]
    for memory, limit, words in limits:
        peak = peak_bytes(needs, memory)
        if limit is None or peak <= limit:
            continue
        phase = max(
            {n.phase for n in needs},
            key=lambda p: sum(n.num_bytes for n in needs if (n.phase, n.memory) == (p, memory)),
        )
        parts = [n for n in needs if n.phase == phase and n.memory == memory and n.num_bytes]
        listed = ", ".join(f"{n.what} {format_bytes(n.num_bytes)}" for n in parts)
        smallest = -(-peak // _WHOLE_MIB)
        allowed, needed = format_bytes(limit), format_bytes(peak)
        if allowed == needed:
            allowed, needed = f"{limit} bytes", f"{peak} bytes"
        raise BudgetError(
            f"{words}: {allowed} may be used, {phase} needs {needed} ({listed}); "
            f"the smallest that would do is `{memory}_budget={smallest}MiB`"
        )


def _largest(most: int, good: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that is ``good``, 0 if none is; every number below a good one is good."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low
