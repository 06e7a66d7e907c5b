"""How a budget of memory is spent, and how weights are read.

First what cannot be done without is counted, at the smallest setting; what does not fit is refused before a weight is
read. What is then left goes to hidden states kept in memory instead of on the disk, to more candidates in a sweep, and
to layers that stay resident, in this order: the first two cost little, the last can take everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from streamcollapse.errors import BudgetError
from streamcollapse.forward.batches import MAX_CALL_TOKENS, activation_bytes, logits_bytes
from streamcollapse.resources.budget import Budget, budget_for, free_ram
from streamcollapse.run.needs import (
    MOST_CANDIDATES,
    Demand,
    Memory,
    MemoryPlan,
    Need,
    Workload,
    least,
    needs_on_cpu,
    needs_on_device,
    peak_bytes,
    workload_of,
)
from streamcollapse.run.opened import Job
from streamcollapse.run.repair_needs import LEAST_BLOCK
from streamcollapse.run.samples import Samples
from streamcollapse.settings.run import Streaming
from streamcollapse.storage.probe import cached_share, read_rate
from streamcollapse.storage.reader import check_direct_reads
from streamcollapse.units import format_bytes

_PROBE_BYTES = 1 << 28
_WORTH_PROBING = 4 * _PROBE_BYTES  # bytes of checkpoint; less is read before a probe would pay
_MOSTLY = 0.9  # in the page cache: nothing is faster than what is there already
_WHOLE_MIB = 1 << 20


def plan_memory(job: Job, samples: Samples | None, streaming: Streaming, demand: Demand) -> MemoryPlan:
    """How a search spends the memory it may use. Raises BudgetError before any weight is read."""
    work = workload_of(job.checkpoint, job.architecture.survey, job.placement, demand, samples)
    plan = spend(work, budget_for(streaming, job.placement.device), streaming)
    activations = max(work.activations, 4 * logits_bytes(job.vocabulary, job.placement.grain) if work.head else 0)
    return replace(plan, io=choose_io(job, streaming.io, plan), activations=activations)


def plan_repair(job: Job, streaming: Streaming, repair: tuple[str, int, int]) -> MemoryPlan:
    """How a repair (Demand) that no search precedes spends the memory it may use. Raises BudgetError before any weight
    is read."""
    plan = plan_memory(job, None, streaming, Demand(boundaries=1, repair=repair))
    return replace(plan, needs=tuple(need for need in plan.needs if need.phase not in ("reference", "search")))


def plan_one_layer(job: Job, streaming: Streaming, call_tokens: int = MAX_CALL_TOKENS) -> MemoryPlan:
    """For passes that hold one layer and the activations of a call of ``call_tokens``: nothing stays."""
    shapes = [job.source.info(name).shape for name in job.architecture.layout.layer_names(0)]
    activations = activation_bytes(shapes, job.hidden_size, (1, call_tokens), job.placement.dtype.itemsize)
    drop_after_use = job.checkpoint.num_bytes > free_ram()
    plan = MemoryPlan(streaming.prefetch, drop_after_use=drop_after_use, activations=activations)
    return replace(plan, io=choose_io(job, streaming.io, plan))


def choose_io(job: Job, io: str, plan: MemoryPlan) -> str:
    """``io``, or what a short measurement says for auto.

    On a CPU mapped weights are used in place; reading past the page cache pays only where the checkpoint does not fit
    into memory and the disk is faster that way. Raises CheckpointError where the file system refuses the I/O mode asked
    for. A CUDA device gets its weights from pinned memory in any case.
    """
    if io == "direct":
        check_direct_reads(job.checkpoint.shards[0].path)
    if io != "auto":
        return io
    mapped = "mmap" if job.placement.device.type == "cpu" else "pread"
    fits = not plan.drop_after_use
    small = job.checkpoint.num_bytes < _WORTH_PROBING
    if fits or small or cached_share(job.checkpoint) > _MOSTLY:
        return mapped
    rates = {mode: read_rate(job.checkpoint, mode, _PROBE_BYTES) for mode in (mapped, "direct")}
    through, past = rates[mapped], rates["direct"]
    return "direct" if through is not None and past is not None and past > through else mapped


def spend(work: Workload, budget: Budget, streaming: Streaming) -> MemoryPlan:
    """Spend ``budget``. Raises BudgetError, with the smallest budget that would do, where it is too small."""
    on_device = budget.vram is not None
    list_needs = needs_on_device if on_device else needs_on_cpu
    plan = least(work, streaming, on_device)
    if work.mending is not None and work.mending.solved:
        plan = _solving(work, plan, budget, list_needs)
    refuse(plan.needs, budget)

    def fits(other: MemoryPlan, share: float = 1.0) -> bool:
        """Whether ``other`` takes at most ``share`` of what ``plan`` leaves."""
        before, after = list_needs(work, plan), list_needs(work, other)
        limits: list[tuple[Memory, int]] = [("ram", budget.ram), ("vram", budget.vram or 0)]
        return all(
            peak_bytes(after, m) <= peak_bytes(before, m) + share * (limit - peak_bytes(before, m))
            for m, limit in limits
        )

    if fits(in_memory := replace(plan, spill=False), 0.5):
        plan = in_memory
    if streaming.lookahead is None:
        more = _largest(MOST_CANDIDATES, lambda n: fits(replace(plan, candidates=n), 0.25))
        plan = replace(plan, candidates=max(more, 1))
    stay = _largest(work.num_layers, lambda n: fits(replace(plan, resident_layers=n)))
    slots = (work.window + plan.prefetch) * work.layer
    left = (budget.ram if not on_device else budget.vram or 0) - peak_bytes(
        list_needs(work, replace(plan, resident_layers=stay)), "vram" if on_device else "ram"
    )
    plan = replace(plan, resident_layers=stay, drop_after_use=stay < work.num_layers, slot_bytes=slots + max(left, 0))
    return replace(plan, needs=tuple(list_needs(work, plan)), budget=budget)


def _solving(
    work: Workload, plan: MemoryPlan, budget: Budget, list_needs: Callable[[Workload, MemoryPlan], list[Need]]
) -> MemoryPlan:
    """``plan`` with as many input channels solved for at a time as the budget allows: all, a half, a quarter, ..."""
    assert work.mending is not None
    block = work.mending.inputs
    while True:
        chosen = replace(plan, gram_block=block)
        chosen = replace(chosen, needs=tuple(list_needs(work, chosen)))
        fits = peak_bytes(chosen.needs, "ram") <= budget.ram
        fits = fits and (budget.vram is None or peak_bytes(chosen.needs, "vram") <= budget.vram)
        if fits or block <= LEAST_BLOCK:
            return chosen
        block = -(-block // 2)


def refuse(needs: Sequence[Need], budget: Budget) -> None:
    """Raise BudgetError, with the smallest budget that would do, where ``needs`` are more than ``budget``."""
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
