"""What healing needs in memory, phase by phase, and what of a step is kept where: graphs, hidden states, layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamcollapse.forward.batches import logits_bytes
from streamcollapse.resources.budget import Budget, budget_for
from streamcollapse.run.layer_needs import layer_needs, layer_sizes
from streamcollapse.run.memory_plan import choose_io, refuse
from streamcollapse.run.needs import Kept, Memory, MemoryPlan, Need, peak_bytes
from streamcollapse.run.opened import Job
from streamcollapse.settings.run import Streaming

# of a step, the first that there is room for: graphs of all layers save a run of each; on a GPU copies of hidden states
# take as long as layers
_KEPT_IN: tuple[Kept, ...] = ("graphs", "vram", "ram", "disk")
_GRAPHS = 2  # times the activations that a graph has: 1.1 to 1.7 of three models
_FLOAT32 = 4
_MASTERS = 6  # of what is trained: itself, its gradient, two moments, the best so far, and a copy while that is made
_RESIDENT_SHARE = 0.75  # of what is left of a device: gradients come in pieces of all sizes
_KEPT = 4  # times the activations of a call that the gradients of a layer need
_LOGITS = 6  # blocks: of both models, their logarithms, their difference, and the gradient


@dataclass(frozen=True)
class Course:
    """``trained`` numbers in all and ``whole`` ones in the largest layer that is trained whole; the largest step's
    ``tokens``, in calls of ``call``; tokens that go up together for the ``teacher``, and ``held_out`` ones;
    and those ``at_hand``, whose states, of teacher and student, are in memory all the time."""

    trained: int
    whole: int
    tokens: int
    call: int
    teacher: int
    held_out: int
    at_hand: int = 0


def plan_healing(job: Job, teacher: Job, course: Course, streaming: Streaming) -> tuple[MemoryPlan, MemoryPlan]:
    """How memory is spent, by the teacher's pass and by healing. Raises BudgetError before a weight is read."""
    kept, needs, budget = _spent(job, teacher, course, streaming)
    plans = []
    for one in (teacher, job):
        drop = one.checkpoint.num_bytes + peak_bytes(needs) > budget.ram
        plan = MemoryPlan(streaming.prefetch, spill=kept == "disk", drop_after_use=drop, needs=tuple(needs))
        plan = replace(plan, budget=budget, kept=kept, activations=_KEPT * layer_sizes(one, course.call)[2])
        plans.append(replace(plan, io=choose_io(one, streaming.io, plan)))
    stay, more = _residents(job, needs, budget)
    return plans[0], replace(plans[1], resident_layers=stay, needs=(*plans[1].needs, *more))


def healing_needs(job: Job, course: Course, streaming: Streaming) -> tuple[Kept, list[Need]]:
    """What healing towards the source of ``job`` keeps and needs, without what the pass of a teacher does. Raises
    BudgetError."""
    kept, needs, budget = _spent(job, job, course, streaming)
    return kept, [need for need in (*needs, *_residents(job, needs, budget)[1]) if need.phase == "heal"]


def _spent(job: Job, teacher: Job, course: Course, streaming: Streaming) -> tuple[Kept, list[Need], Budget]:
    """Where hidden states between layers are kept, what is needed with that, and the budget. Raises BudgetError."""
    budget = budget_for(streaming, job.placement.device)
    refuse(_needs(job, teacher, course, "disk"), budget)
    for kept in _KEPT_IN[0 if streaming.io in ("auto", "mmap") and _is_in_place(job) else 1 :]:
        needs = _needs(job, teacher, course, kept)
        held = job.checkpoint.num_bytes if kept == "graphs" else 0  # whose pages the graphs hold
        if peak_bytes(needs, "ram") + held <= budget.ram and peak_bytes(needs, "vram") <= (budget.vram or 0):
            break
    return kept, needs, budget


def _is_in_place(job: Job) -> bool:
    """Whether layers are computed with as they are in the mapped file, so that graphs may hold their weights."""
    names = (name for i in range(job.num_layers) for name in job.architecture.layout.layer_names(i))
    dtypes = {job.source.info(name).dtype for name in names}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    is_as_stored = floating == {job.placement.dtype} and not job.architecture.survey.fused
    return job.placement.device.type == "cpu" and is_as_stored


def _residents(job: Job, needs: Sequence[Need], budget: Budget) -> tuple[int, list[Need]]:
    """How many layers stay on the device, as many as it has memory to spare for, since each step visits them; and what
    they take."""
    if budget.vram is None:
        return 0, []
    layer = layer_sizes(job, 1)[0]
    stay = min(int(_RESIDENT_SHARE * (budget.vram - peak_bytes(needs, "vram"))) // layer, job.num_layers)
    return stay, [Need("heal", f"resident layers: {stay}", stay * layer, "vram")] if stay else []


def _needs(job: Job, teacher: Job, course: Course, kept: Kept) -> list[Need]:
    item, on_device = job.placement.dtype.itemsize, job.placement.device.type != "cpu"
    here: Memory = "vram" if on_device else "ram"
    state = job.hidden_size * item
    between = 2 * min(course.call, course.tokens) if kept == "disk" else (job.num_layers + 2) * course.tokens
    head = (job.architecture.survey.head + teacher.architecture.survey.head) * item
    found: list[Need] = []
    for phase, one in (("teacher", teacher), ("heal", job)):
        found += layer_needs(phase, one, layer_sizes(one, course.call), 1 if phase == "teacher" else _KEPT)
    learning = "what is trained" if course.whole else "adapters"
    where = " of a call (the others on the disk)" if kept == "disk" else ""
    there: Memory = "vram" if on_device and kept == "vram" else "ram"
    if kept == "graphs":
        calls = 2 * -(-course.tokens // course.call)  # at the most: a call has whole rows
        graphs = job.num_layers * _GRAPHS * layer_sizes(job, course.tokens)[2] + calls * item * course.trained
        states = Need("heal", "graphs of all layers", graphs)
    else:
        states = Need("heal", f"hidden states between layers{where}", between * state, there)
    return [
        *found,
        states,
        Need("teacher", "hidden states, going up", 2 * course.teacher * teacher.hidden_size * item, here),
        Need("heal", f"{learning}, gradients and moments", _MASTERS * _FLOAT32 * course.trained, here),
        Need("heal", "what is trained whole, in the compute dtype", 2 * item * course.whole, here),
        Need("heal", "hidden states as embedded", course.tokens * state, here),
        Need("heal", "the teacher's states of a step", course.tokens * teacher.hidden_size * item),
        *([Need("heal", "hidden states of all the text", 2 * course.at_hand * state)] if course.at_hand else []),
        Need(
            "heal", "both heads, and logits", head + _LOGITS * logits_bytes(job.vocabulary, job.placement.grain), here
        ),
        Need("write", "tensors", 4 * max(info.num_bytes for info in map(job.source.info, job.source.names))),
    ]
