"""What a pass that holds one layer at a time needs in memory, and an evaluation, which is such a pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamcollapse.forward.batches import activation_bytes, logits_bytes
from streamcollapse.resources.budget import budget_for
from streamcollapse.run.memory_plan import choose_io, refuse
from streamcollapse.run.needs import DEVICE_LIBRARIES, LIBRARIES, Memory, MemoryPlan, Need, peak_bytes
from streamcollapse.run.opened import Job
from streamcollapse.settings.run import Streaming
from streamcollapse.stream.loaders import DeviceLoader
from streamcollapse.stream.slots import layer_slot_bytes

_MASK = 6  # bytes of a pair of tokens: as numbers, as bits and, for some families, as floats
_STATES_SHARE = 0.75  # of what is left of the budget


def layer_sizes(job: Job, call: int) -> tuple[int, int, int]:
    """Bytes of the largest layer as stored and in the compute dtype, and of the activations of a call."""
    layout, itemsize = job.architecture.layout, job.placement.dtype.itemsize
    layers = [[job.source.info(name) for name in layout.layer_names(i)] for i in range(job.num_layers)]
    shapes = [info.shape for layer in layers for info in layer]
    stored = max(sum(info.num_bytes for info in layer) for layer in layers)
    slot = layer_slot_bytes(layers, job.placement.dtype)
    return stored, slot, activation_bytes(shapes, job.hidden_size, (1, call), itemsize)


def layer_needs(phase: str, job: Job, sizes: tuple[int, int, int], times: int = 1) -> list[Need]:
    """A layer on its way and at work in ``phase``, of these ``sizes`` (layer_sizes), the activations so many times."""
    stored, slot, activations = sizes
    on_device = job.placement.device.type != "cpu"
    here: Memory = "vram" if on_device else "ram"
    found = [Need(phase, "libraries, on first use", LIBRARIES)]
    if on_device:
        found += [Need(phase, "libraries, on first use", DEVICE_LIBRARIES, "vram")]
        found += [Need(phase, "pinned slots", DeviceLoader.HOST_SLOTS * stored)]
    return [
        *found,
        Need(phase, "weights in flight", 3 * stored, here),
        Need(phase, "one layer, mixed or converted", slot, here),
        Need(phase, "activations", times * activations, here),
    ]


@dataclass(frozen=True)
class EvaluationSize:
    """How much an evaluation asks of ``stacks`` models: ``tokens`` in all, ``call`` of them in a call, or those of a
    packed ``row``, or the ``longest`` request; ``kept`` bytes of keys and values while text is generated."""

    tokens: int
    call: int
    row: int
    longest: int
    stacks: int
    kept: int = 0

    def a_token(self, job: Job) -> int:
        """Bytes of the hidden states of a token, of all stacks and of what enters them."""
        return (self.stacks + 1) * job.hidden_size * job.placement.dtype.itemsize


def plan_evaluation(job: Job, asked: EvaluationSize, streaming: Streaming) -> tuple[MemoryPlan, int]:
    """How an evaluation spends memory, and how many bytes of hidden states it holds at once: what does not go up
    together takes another pass over the weights. Keys and values for which there is no memory are spilled. Raises
    BudgetError before a weight is read."""
    device = job.placement.device
    here: Memory = "vram" if device.type != "cpu" else "ram"
    item = job.placement.dtype.itemsize
    largest = max(asked.call, asked.row, asked.longest)
    sizes = layer_sizes(job, largest)
    head = job.architecture.survey.head * item + 3 * logits_bytes(job.vocabulary, job.placement.grain)
    needs = [
        *layer_needs("evaluate", job, sizes),
        Need("evaluate", "what tokens attend to", _MASK * asked.row**2, here),
        Need("evaluate", "head, and logits", head, here),
    ]
    a_token = asked.a_token(job)
    budget = budget_for(streaming, device)
    limit = (budget.vram or 0) if here == "vram" else budget.ram
    left = _STATES_SHARE * (limit - peak_bytes(needs, here))
    held = max(min(asked.tokens * a_token, int(left)), largest * a_token)
    needs.append(Need("evaluate", "hidden states", held, here))
    refuse(needs, budget)
    spill = asked.kept > limit - peak_bytes(needs, here)
    if asked.kept and not spill:
        needs.append(Need("evaluate", "keys and values", asked.kept, here))
    drop = job.checkpoint.num_bytes + peak_bytes(needs) > budget.ram
    plan = MemoryPlan(streaming.prefetch, spill=spill, drop_after_use=drop, activations=sizes[2], needs=tuple(needs))
    return replace(plan, io=choose_io(job, streaming.io, plan), budget=budget), held
