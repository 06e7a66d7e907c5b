"""What a run needs in memory, from headers and samples alone. How a budget is spent on it: memory_plan.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from streamcollapse.arch.survey import Survey
from streamcollapse.forward.batches import (
    KEPT_BYTES,
    MAX_CALL_TOKENS,
    activation_bytes,
    call_tokens,
    distributions_bytes,
    logits_bytes,
    one_in,
)
from streamcollapse.merge.mixing import mixing_bytes
from streamcollapse.progress import MemoryPlanned
from streamcollapse.resources.budget import Budget
from streamcollapse.run.repair_needs import Mending, mending_of, repair_needs
from streamcollapse.settings.catalogue import EFFORTS, METRICS, Effort
from streamcollapse.settings.run import Streaming
from streamcollapse.storage.source import TensorSource
from streamcollapse.stream.loaders import DeviceLoader
from streamcollapse.stream.slots import layer_slot_bytes

if TYPE_CHECKING:  # inspecting a checkpoint needs no samples, and no model: importing that takes seconds
    from streamcollapse.resources.device import Placement
    from streamcollapse.run.samples import Samples

MOST_CANDIDATES = 512  # in one sweep on its own account; benchmarks/simulate_reads.py shows what they save
LIBRARIES = 40 << 20  # code and buffers that libraries load on first use, whatever the model: 20 to 40 MiB were seen
# torch's workspaces for products (32 MiB for each of two libraries on Hopper), the allocator's rounding; not measured
DEVICE_LIBRARIES = 128 << 20

# where no samples are at hand: ten sentences, 24 passages
ASSUMED_TOKENS = {"sentences": 10 * 64, "passages": 24 * 256}

Memory = Literal["ram", "vram"]
Kept = Literal["graphs", "vram", "ram", "disk"]


@dataclass(frozen=True)
class Need:
    """``num_bytes`` of ``memory`` that ``phase`` holds at its peak for ``what``."""

    phase: str
    what: str
    num_bytes: int
    memory: Memory = "ram"


@dataclass(frozen=True)
class Demand:
    """What a search asks of memory: how many layer ``boundaries`` it starts from, how many layers a merge combines
    (``window``), the ``metric`` it judges by, with what ``effort``, the ``samples`` it takes where none are at hand,
    how many tokens of ``held_out`` text judge its result; and the ``repair``: its method, on how many tokens, in calls
    of how many."""

    boundaries: int
    window: int = 1
    metric: str = "cosine"
    samples: str = "sentences"
    effort: Effort = EFFORTS["thorough"]
    held_out: int = 0
    repair: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class Workload:
    """What a run has to hold, in bytes, whatever the budget.

    ``layer``: the largest decoder layer as stored; ``slot``: the same in the compute dtype; ``converted``: whether
    stored weights cannot be used as they are; ``state``: the hidden states of all samples at one layer boundary;
    ``boundaries``: how many of these the search starts from; ``activations``: inside one call of a layer; ``tensor``:
    the largest tensor of a layer; ``window``: layers that a merge combines, of which all have to be there at once;
    ``fused``: parameters that are put together from several tensors; ``head``: the head and logits (four blocks, and
    for ``kl`` the original's distributions where they are few), where the metric needs them;
    ``judging``: the head, logits and hidden states of the source and the result on held-out text;
    ``embedding``: the input embedding in the compute dtype; ``mixing``: what mixing one tensor makes on a device;
    ``mending``: what a repair is about, where there is one.
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
    judging: int = 0
    mending: Mending | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """How the budget is spent. ``drop_after_use``: file pages are dropped, because the checkpoint is
    larger than what may stay; ``slot_bytes``: for all slots of the weight stream together; ``io``: the way of reading;
    ``activations``: what a call of a layer, or of the head, makes and lets go of; ``gram_block``: input channels that a
    repair solves for at a time (None: all); ``kept``: where hidden states between layers that are trained are,
    or that graphs of the layers are kept instead."""

    prefetch: int
    candidates: int = 1
    resident_layers: int = 0
    spill: bool = True
    drop_after_use: bool = False
    slot_bytes: int = 0
    needs: tuple[Need, ...] = ()
    budget: Budget | None = None
    io: str = "mmap"
    activations: int = 0
    gram_block: int | None = None
    kept: Kept = "ram"

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

    @property
    def event(self) -> MemoryPlanned:
        """What listeners are told of it."""
        rows = tuple((need.phase, need.what, need.num_bytes, need.memory) for need in self.needs)
        return MemoryPlanned(rows, self.budgets, self.io)

    def resident(self, num_layers: int) -> range:
        """The layers that stay: the top of the stack, which every sweep visits."""
        return range(num_layers - self.resident_layers, num_layers)


def workload_of(
    source: TensorSource, model: Survey, placement: Placement, demand: Demand, samples: Samples | None = None
) -> Workload:
    """What a search of ``demand`` has to hold with ``samples``, or with as many tokens as those that it takes."""
    dtype, grain = placement.dtype, placement.grain
    tokens = ASSUMED_TOKENS[demand.samples] if samples is None else samples.num_tokens
    calls = [(1, grain * MAX_CALL_TOKENS) if samples is None else samples.largest_call]
    calls += [] if demand.repair is None else [(1, demand.repair[2])]
    layers = [[source.info(name) for name in names] for names in model.layers]
    infos = [info for layer in layers for info in layer]
    if demand.held_out:
        widest = max((max(info.shape[-2:]) for info in infos if len(info.shape) > 1), default=model.hidden_size)
        calls += [(1, min(demand.held_out, call_tokens(widest, grain)))]
    call = max(calls, key=math.prod)
    head = judging = 0
    if METRICS[demand.metric].by_logits and model.head:
        lengths = [(tokens,)] if samples is None else [batch.lengths for batch in samples.batches]
        head_tokens = demand.effort.head_tokens(model.vocabulary)
        every = one_in(lengths, head_tokens)
        item = dtype.itemsize
        kept = distributions_bytes(lengths, model.vocabulary, every, item) if demand.metric == "kl" else 0
        kept += item * model.vocabulary * (head_tokens or 0) // 2 if kept else 0  # the scout's
        finer = one_in(lengths, demand.effort.exchange_tokens(model.vocabulary)) if demand.effort.exchanges else 0
        more = distributions_bytes(lengths, model.vocabulary, finer, item) if kept and finer else 0
        held = sum(one for one in (kept, more) if one <= KEPT_BYTES)
        head = model.head * dtype.itemsize + 4 * logits_bytes(model.vocabulary, grain) + held
    if demand.held_out:
        states = 3 * demand.held_out * model.hidden_size  # what entered, and two stacks
        judging = (states + model.head) * dtype.itemsize + 4 * logits_bytes(model.vocabulary, grain)
    return Workload(
        num_layers=len(layers),
        layer=max(sum(info.num_bytes for info in layer) for layer in layers),
        slot=layer_slot_bytes(layers, dtype),
        converted=any(info.dtype != dtype for info in infos if info.dtype.is_floating_point),
        state=tokens * model.hidden_size * dtype.itemsize,
        boundaries=demand.boundaries,
        activations=activation_bytes([info.shape for info in infos], model.hidden_size, call, dtype.itemsize),
        tensor=max(info.num_bytes for info in infos),
        window=demand.window,
        fused=model.fused * dtype.itemsize,
        head=head,
        embedding=model.embedding * dtype.itemsize,
        judging=judging,
        mixing=max(mixing_bytes(info.num_elements, info.dtype) for info in infos),
        mending=demand.repair and mending_of(layers, model.hidden_size, dtype.itemsize, demand.repair),
    )


def least(work: Workload, streaming: Streaming, on_device: bool) -> MemoryPlan:
    """The smallest setting that ``streaming`` allows: nothing resident, boundaries on the disk."""
    plan = MemoryPlan(streaming.prefetch, streaming.lookahead or 1)
    needs = needs_on_device(work, plan) if on_device else needs_on_cpu(work, plan)
    return replace(plan, needs=tuple(needs))


def needs_on_cpu(work: Workload, plan: MemoryPlan) -> list[Need]:
    """Memory of each phase on a CPU. Weights in flight and resident are file pages if the checkpoint is mapped."""
    in_flight = (1 + plan.prefetch) * work.layer
    kept = _boundary_bytes(work, plan)
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
        Need("reference", _where(plan), kept),
        Need("search", "weights in flight", (work.window + plan.prefetch) * work.layer),
        Need("search", "one layer, mixed or converted", work.slot),
        Need(
            "search", f"hidden states of {_counted(plan.candidates, 'candidate')}", (plan.candidates + 3) * work.state
        ),
        *([Need("search", "the head, and logits", work.head)] if work.head else []),
        Need("search", "activations", work.activations),
        Need("search", _where(plan), kept),
        Need("search", f"resident layers: {plan.resident_layers}", plan.resident_layers * work.layer),
        Need("write", "tensors in flight", (1 + plan.prefetch) * work.tensor),
        Need("write", "one tensor, mixed", work.tensor),
        *_repair(work, plan, [("weights in flight", in_flight + work.layer), ("libraries, on first use", LIBRARIES)]),
        *_verdict(work, [("weights in flight", in_flight), ("libraries, on first use", LIBRARIES)], "ram"),
    ]


def _repair(work: Workload, plan: MemoryPlan, more: Sequence[tuple[str, int]], memory: Memory = "ram") -> list[Need]:
    """What a repair takes where layers are computed, with ``more``; nothing where nothing is repaired."""
    rows = [*more, ("one layer, mixed or converted", work.slot), *repair_needs(work, plan)]
    return [Need("repair", what, count, memory) for what, count in rows if count and work.mending is not None]


def _verdict(work: Workload, more: Sequence[tuple[str, int]], memory: Memory) -> list[Need]:
    """What judging the result takes, with ``more``; nothing where nothing is judged."""
    rows = [
        *more,
        ("one layer, mixed or converted", work.slot),
        ("experts of one layer, put together", work.fused),
        ("the head, logits and hidden states", work.judging),
        ("activations", work.activations),
    ]
    return [Need("verdict", what, count, memory) for what, count in rows if count and work.judging]


def needs_on_device(work: Workload, plan: MemoryPlan) -> list[Need]:
    """Memory of each phase with a CUDA device."""
    kept = _boundary_bytes(work, plan)
    pinned, resident = DeviceLoader.HOST_SLOTS * work.layer, plan.resident_layers * work.layer
    needs = [
        Need("embedding", "the input embedding, whole", work.embedding, "vram"),
        Need("embedding", "one layer, mixed or converted", work.slot, "vram"),
        Need("embedding", "hidden states", work.state, "vram"),
    ]
    for phase, states in (("reference", 4), ("search", plan.candidates + 4)):
        slots = ((work.window if phase == "search" else 1) + plan.prefetch) * work.layer
        needs += [
            Need(phase, "libraries, on first use", LIBRARIES),
            Need(phase, "pinned slots", pinned),
            Need(phase, "libraries, on first use", DEVICE_LIBRARIES, "vram"),
            Need(phase, _where(plan), kept),
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
            Need(phase, f"resident layers: {plan.resident_layers}", resident, "vram"),
        ]
    return [
        *needs,
        Need("write", "one tensor, mixed", work.tensor),
        Need("write", "one tensor and the sources of its mix", 6 * work.tensor + work.mixing, "vram"),
        Need("write", "the embedding or the head, whole", work.embedding, "vram"),
        *_repair(work, plan, [("libraries, on first use", LIBRARIES), ("pinned slots", pinned)]),
        *_repair(
            work,
            plan,
            [("libraries, on first use", DEVICE_LIBRARIES), ("weights in flight", (2 + plan.prefetch) * work.layer)],
            "vram",
        ),
        *_verdict(work, [("libraries, on first use", LIBRARIES), ("pinned slots", pinned)], "ram")[:2],
        *_verdict(
            work,
            [("libraries, on first use", DEVICE_LIBRARIES), ("weights in flight", (1 + plan.prefetch) * work.layer)],
            "vram",
        ),
    ]


def _boundary_bytes(work: Workload, plan: MemoryPlan) -> int:
    return 2 * work.state if plan.spill else work.boundaries * work.state


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _where(plan: MemoryPlan) -> str:
    return "boundary hidden states" + (", one at a time (the others on the disk)" if plan.spill else "")


def peak_bytes(needs: Sequence[Need], memory: Memory = "ram") -> int:
    """The most ``memory`` that any phase holds."""
    chosen = [need for need in needs if need.memory == memory]
    return max((sum(n.num_bytes for n in chosen if n.phase == phase) for phase in {n.phase for n in chosen}), default=0)
