"""What a run needs in memory, from headers and samples alone, and how a budget is spent on it.

First what cannot be done without is counted, at the smallest setting; what does not fit is refused before a weight is
read. What is then left goes to hidden states kept in memory instead of on the disk, to more candidates in a sweep, and
to layers that stay resident, in this order: the first two cost little, the last can take everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from streamcollapse.arch.assembly import Assembly
from streamcollapse.arch.layout import Layout
from streamcollapse.errors import BudgetError
from streamcollapse.merge.mixing import mixing_bytes
from streamcollapse.settings.run import Streaming
from streamcollapse.storage.source import TensorSource
from streamcollapse.stream.budget import Budget
from streamcollapse.stream.loaders import DeviceLoader
from streamcollapse.stream.slots import carved_bytes
from streamcollapse.units import format_bytes

MOST_CANDIDATES = 512  # in one sweep on its own account; benchmarks/simulate_reads.py shows what they save
_WHOLE_MIB = 1 << 20
LIBRARIES = 40 << 20  # code and buffers that libraries load on first use, whatever the model: 20 to 40 MiB were seen
# torch's workspaces for matrix products (32 MiB each for two libraries on Hopper, less on others) and the allocator's
# rounding of small blocks to pieces of 2 and 20 MiB; not measured
DEVICE_LIBRARIES = 128 << 20

Memory = Literal["ram", "vram"]


@dataclass(frozen=True)
class Need:
    """``num_bytes`` of ``memory`` that ``phase`` holds at its peak for ``what``."""

    phase: str
    what: str
    num_bytes: int
    memory: Memory = "ram"


@dataclass(frozen=True)
class Work:
    """What a run has to hold, in bytes, whatever the budget.

    ``layer``: the largest decoder layer as stored; ``slot``: the same in the compute dtype; ``converted``: whether
    stored weights cannot be used as they are; ``state``: the hidden states of all samples at one layer boundary;
    ``boundaries``: how many of these the search starts from; ``activations``: inside one call of a layer; ``tensor``:
    the largest tensor of a layer; ``window``: layers that a merge combines, of which all have to be there at once;
    ``fused``: what ``fused_bytes`` counts; ``head``: final norm, head and logits, where the metric needs them;
    ``embedding``: the input embedding in the compute dtype; ``mixing``: what mixing one tensor makes on a device.
    """

    num_layers: int
    layer: int
    slot: int
    converted: bool
    state: int
    boundaries: int
    activations: int
    tensor: int
    window: int = 1
    fused: int = 0
    head: int = 0
    embedding: int = 0
    mixing: int = 0


@dataclass(frozen=True)
class Allotment:
    """How the budget is spent. ``from_cache``: file pages are dropped after use, because the checkpoint is larger than
    what may stay; ``slot_bytes``: for all slots of the weight stream together; ``io``: the way of reading;
    ``activations``: what a call of a layer, or of the head, makes and lets go of."""

    prefetch: int
    candidates: int = 1
    resident_layers: int = 0
    spill: bool = True
    from_cache: bool = False
    slot_bytes: int = 0
    needs: tuple[Need, ...] = ()
    budget: Budget | None = None
    io: str = "mmap"
    activations: int = 0

    @property
    def budgets(self) -> dict[str, int]:
        """Bytes that may be held, by kind of memory; empty where no budget was asked."""
        found = {} if self.budget is None else {"ram": self.budget.ram, "vram": self.budget.vram}
        return {kind: limit for kind, limit in found.items() if limit is not None}

    def to_json(self) -> dict[str, Any]:
        """The choices and their cost as JSON types."""
        fields = asdict(self)
        return {key: fields[key] for key in ("io", "prefetch", "candidates", "resident_layers", "spill", "needs")} | {
            "budgets": self.budgets
        }

    def resident(self, num_layers: int) -> range:
        """The layers that stay: the top of the stack, which every sweep visits."""
        return range(num_layers - self.resident_layers, num_layers)


def measure_work(
    source: TensorSource,
    layout: Layout,
    dtype: torch.dtype,
    hidden_size: int,
    tokens: int,
    call: tuple[int, int],
    boundaries: int,
    window: int = 1,
    embedding: int = 0,
) -> Work:
    """The Work of ``tokens`` calibration tokens; ``call`` is the largest call: rows and tokens of its longest row.
    ``embedding``: bytes of the input embedding in ``dtype``."""
    infos = [source.info(name) for i in range(layout.num_layers) for name in layout.layer_names(i)]
    return Work(
        num_layers=layout.num_layers,
        layer=max(sum(source.info(n).num_bytes for n in layout.layer_names(i)) for i in range(layout.num_layers)),
        slot=layer_slot_bytes(source, layout, dtype),
        converted=any(info.dtype != dtype for info in infos if info.dtype.is_floating_point),
        state=tokens * hidden_size * dtype.itemsize,
        boundaries=boundaries,
        activations=activation_bytes([info.shape for info in infos], hidden_size, call, dtype.itemsize),
        tensor=max(info.num_bytes for info in infos),
        window=window,
        fused=fused_bytes(layout, dtype),
        embedding=embedding,
        mixing=max(mixing_bytes(info.num_elements, info.dtype) for info in infos),
    )


def activation_bytes(shapes: Sequence[tuple[int, ...]], hidden_size: int, call: tuple[int, int], itemsize: int) -> int:
    """Six states of the model's width (residual, norm, query, key, value, attended) and four of the widest matrix
    (gate, up, their product, one temporary) for each token. Attention scores are never whole in memory."""
    widest = max((max(shape[-2:]) for shape in shapes if len(shape) > 1), default=hidden_size)
    return call[0] * call[1] * (6 * hidden_size + 4 * widest) * itemsize


def layer_slot_bytes(source: TensorSource, layout: Layout, dtype: torch.dtype) -> int:
    """Bytes of the slot that holds any one layer in the compute ``dtype``."""

    def placed(name: str) -> int:
        info = source.info(name)
        return carved_bytes(info.num_elements * (dtype if info.dtype.is_floating_point else info.dtype).itemsize)

    return max(sum(placed(name) for name in layout.layer_names(i)) for i in range(layout.num_layers))


def fused_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Bytes of the parameters that one layer's module puts together from several tensors (experts), while it does: the
    largest of them twice."""

    def of_layer(assemblies: Sequence[Assembly]) -> int:
        made = [math.prod(shape) for each in assemblies if each.rules for shape in each.shapes.values()]
        return (sum(made) + max(made, default=0)) * dtype.itemsize

    return max(of_layer(assemblies) for assemblies in layout.assemblies)


def needs_on_cpu(work: Work, choice: Allotment) -> list[Need]:
    """Memory of each phase on a CPU. Weights in flight and resident are file pages if the checkpoint is mapped."""
    in_flight = (1 + choice.prefetch) * work.layer
    kept = _boundary_bytes(work, choice)
    return [
        *(Need(phase, "libraries, on first use", LIBRARIES) for phase in ("reference", "search", "write")),
        Need("reference", "weights in flight", in_flight),
        Need("reference", "one layer, converted", work.slot if work.converted else 0),
        *(
            Need(phase, "experts of one layer, put together", work.fused)
            for phase in ("reference", "search")
            if work.fused
        ),
        Need("reference", "hidden states, going up", 2 * work.state),
        Need("reference", "activations", work.activations),
        Need("reference", _where(choice), kept),
        Need("search", "weights in flight", (work.window + choice.prefetch) * work.layer),
        Need("search", "one layer, mixed or converted", work.slot),
        Need(
            "search",
            f"hidden states of {_counted(choice.candidates, 'candidate')}",
            (choice.candidates + 3) * work.state,
        ),
        *([Need("search", "the head, and logits", work.head)] if work.head else []),
        Need("search", "activations", work.activations),
        Need("search", _where(choice), kept),
        Need("search", f"resident layers: {choice.resident_layers}", choice.resident_layers * work.layer),
        Need("write", "tensors in flight", (1 + choice.prefetch) * work.tensor),
        Need("write", "one tensor, mixed", work.tensor),
    ]


def needs_on_device(work: Work, choice: Allotment) -> list[Need]:
    """Memory of each phase with a CUDA device."""
    kept = _boundary_bytes(work, choice)
    pinned, resident = DeviceLoader.HOST_SLOTS * work.layer, choice.resident_layers * work.layer
    needs = [
        Need("embedding", "the input embedding, whole", work.embedding, "vram"),
        Need("embedding", "one layer, mixed or converted", work.slot, "vram"),
        Need("embedding", "hidden states", work.state, "vram"),
    ]
    for phase, states in (("reference", 4), ("search", choice.candidates + 4)):
        slots = ((work.window if phase == "search" else 1) + choice.prefetch) * work.layer
        needs += [
            Need(phase, "libraries, on first use", LIBRARIES),
            Need(phase, "pinned slots", pinned),
            Need(phase, "libraries, on first use", DEVICE_LIBRARIES, "vram"),
            Need(phase, _where(choice), kept),
            Need(phase, "weights in flight", slots, "vram"),
            Need(phase, "one layer, mixed or converted", work.slot, "vram"),
            *([Need(phase, "sums of a mix", work.mixing, "vram")] if phase == "search" else []),
            *([Need(phase, "experts of one layer, put together", work.fused, "vram")] if work.fused else []),
            Need(
                phase,
                f"hidden states of {_counted(states - 4, 'candidate')} and the original",
                states * work.state,
                "vram",
            ),
            *([Need(phase, "the head, and logits", work.head, "vram")] if work.head and phase == "search" else []),
            Need(phase, "activations", work.activations, "vram"),
            Need(phase, f"resident layers: {choice.resident_layers}", resident, "vram"),
        ]
    return [
        *needs,
        Need("write", "one tensor, mixed", work.tensor),
        Need("write", "one tensor and the sources of its mix", 6 * work.tensor + work.mixing, "vram"),
        Need("write", "the embedding or the head, whole", work.embedding, "vram"),
    ]


def _boundary_bytes(work: Work, choice: Allotment) -> int:
    return 2 * work.state if choice.spill else work.boundaries * work.state


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _where(choice: Allotment) -> str:
    return "boundary hidden states" + (", one at a time (the others on the disk)" if choice.spill else "")


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
            f"the smallest that would do is --{memory}-budget {smallest}MiB"
        )


def _largest(most: int, good: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that is ``good``, 0 if none is; every number below a good one is good."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def peak_bytes(needs: Sequence[Need], memory: Memory = "ram") -> int:
    """The most ``memory`` that any phase holds."""
    chosen = [need for need in needs if need.memory == memory]
    return max((sum(n.num_bytes for n in chosen if n.phase == phase) for phase in {n.phase for n in chosen}), default=0)
