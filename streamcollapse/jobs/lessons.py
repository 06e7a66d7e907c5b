"""What healing learns from, prepared before a weight is read: the teacher, the text, the steps, and memory for both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from streamcollapse.errors import BudgetError, CalibrationError, ModelError, OptionError, PlanError
from streamcollapse.forward.batches import one_in
from streamcollapse.forward.model import StreamedModel
from streamcollapse.healing.learn import Progress, Schedule
from streamcollapse.healing.teacher import MOST_TOKENS
from streamcollapse.healing.trained import linear_modules
from streamcollapse.healing.updown import Student
from streamcollapse.merge.plan import PLAN_FILE, Plan, PlanLayer
from streamcollapse.progress import WarningRaised
from streamcollapse.repair.climb import Climb, plan_climb
from streamcollapse.run.fit_text import FitText
from streamcollapse.run.heal_plan import Course, healing_needs, plan_healing
from streamcollapse.run.heal_text import HealText, heal_text
from streamcollapse.run.needs import Kept, MemoryPlan, Need
from streamcollapse.run.opened import Job
from streamcollapse.run.repair_needs import CUT_JUDGEMENTS, CUT_ROUNDS
from streamcollapse.run.samples import load_tokenizer
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.heal import Healing
from streamcollapse.settings.run import RunSettings, Streaming
from streamcollapse.storage.source import ObservedSource
from streamcollapse.stream.loaders import PlainLoader
from streamcollapse.stream.weights import Limits, WeightStream

BELOW_CUTS = "end to end"  # the phase of the last step of a repair
CUT_RATES = {
    "cuts": (0.005, 0.0015),
    "lora:cuts": (1e-3, 3e-4),
}  # of a repair; the second where the first learns nothing
_CUT_RANK = 64  # of adapters on layers below cuts
_T = TypeVar("_T")
_ELSEWHERE = ("teacher", "file", "adapter")  # settings that are paths, or make no difference to the course


@dataclass(frozen=True)
class Lessons:
    """``healing`` by ``teacher`` on ``text``; ``course``: its size; ``memory`` of it and of the teacher's pass.
    ``climb``: where the stack differs from the teacher, None where its plan says it."""

    teacher: Job
    healing: Healing
    text: HealText
    course: Course
    teacher_memory: MemoryPlan
    memory: MemoryPlan
    climb: Climb | None = None

    @property
    def schedule(self) -> Schedule:
        """The steps."""
        healing, a_round = self.healing, -(-len(self.text.learn) // self.text.a_step)
        steps = a_round * healing.rounds
        every = healing.judge_every or max(steps // 10, 1)
        warm_up = max(round(healing.warm_up * steps), 1)
        return Schedule(steps, healing.largest_rate, warm_up, healing.clip, every, healing.patience)

    @property
    def every(self) -> int:
        """One in how many tokens the loss is taken of."""
        return one_in([[len(ids) - 1 for ids in self.text.learn[: self.text.a_step]]], self.healing.loss_tokens)

    @property
    def passes(self) -> int:
        """Passes over weights for all the text, at the most."""
        return -(-sum(self.text.tokens) // MOST_TOKENS)

    def positions(self, layers: Sequence[PlanLayer]) -> list[int]:
        """Where the stack ``layers`` is trained. Raises OptionError."""
        climb = self.climb or plan_climb(layers, self.teacher.num_layers)
        return self.healing.positions(len(layers), climb.start, climb.mended)

    @property
    def teacher_identity(self) -> str:
        """What the teacher's states depend on."""
        place = self.teacher.placement
        return _digest([self.teacher.checkpoint.fingerprint(), self.text.digest, str(place.device), place.dtype_name])

    def identity(self, plan_digest: str) -> str:
        """What the course of healing depends on, of the stack that has this plan."""
        settings = {name: str(value) for name, value in asdict(self.healing).items() if name not in _ELSEWHERE}
        return _digest([self.teacher_identity, plan_digest, settings, *(self.climb.mended if self.climb else ())])

    def visits(self, student: Student, progress: Progress) -> int:
        """Layers that are still to be visited by ``student``."""
        schedule, trained = self.schedule, len(student.layers) - student.lowest
        left = schedule.steps - progress.step
        judged = left // schedule.every + 1 + (progress.step == 0)
        return left * (trained if student.keeps_graphs else 2 * trained - 1) + judged * trained

    def expected(self, layer: float, word: float, num_layers: int, lowest: int) -> dict[str, list[tuple[float, float]]]:
        """Seconds of each phase, as TimeExpected has them, of a stack of ``num_layers`` that is trained from the
        ``lowest`` up, where a token takes ``layer`` in a layer and ``word`` in the head: up, up again (but where graphs
        are kept) and twice as much down; judgements; and once up to the lowest."""
        schedule, trained = self.schedule, num_layers - lowest
        learned = schedule.steps * self.course.tokens
        judged = (schedule.steps // schedule.every + 1) * self.course.held_out
        head = word / self.every
        runs = 3 if self.memory.kept == "graphs" else 4
        seconds = learned * (runs * trained * layer + 4 * head) + judged * (trained * layer + 2 * head)
        seconds += sum(self.text.tokens) * lowest * layer
        found = {"heal": [(seconds, 0.0)]}
        if self.healing.loss == "nll":
            return found
        return {"teacher": [(sum(self.text.tokens) * self.teacher.num_layers * layer, 0.0)], **found}

    @cached_property
    def teacher_tail(self) -> StreamedModel:
        """The teacher, of which only final norm and head are read."""
        job = self.teacher
        loader = PlainLoader(job.overlay, job.placement.device)
        return job.model(WeightStream(job.source, job.placement.device, loader, job.meter, Limits(0)))

    @property
    def disk(self) -> int:
        """Bytes of the work directory: the teacher's states and those that enter the lowest layer that is trained,
        hidden states that do not fit, and what is saved."""
        item = self.teacher.placement.dtype.itemsize
        states = 2 * sum(self.text.tokens) * self.teacher.hidden_size * item
        between = (self.teacher.num_layers + 2) * self.course.tokens * self.teacher.hidden_size * item
        return states + (between if self.memory.spill else 0) + 2 * 16 * self.course.trained


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def lessons_of(job: Job, teacher: Job, healing: Healing, streaming: Streaming) -> Lessons:
    """How the stack of ``job``, or a smaller one of its layers, is healed towards ``teacher``, checked. Raises
    StreamCollapseError."""
    climb = None
    if job is not teacher:
        _check_pair(job, teacher, healing)
        climb = _climb(job, teacher)
    text = heal_text(job, healing)
    at_most = climb or Climb(0, ())  # where a search has yet to say what is cut out
    trained = healing.positions(job.num_layers, at_most.start, at_most.mended)
    return _planned(job, teacher, healing, text, _course(job, healing, text, trained), climb, streaming)


def lessons_of_cuts(
    job: Job, text: FitText, layers: Sequence[PlanLayer], streaming: Streaming, turn: int = 0
) -> Lessons:
    """How the layers below cuts of the stack ``layers`` are trained end to end on ``text``, by the rate whose ``turn``
    it is: whole, or by adapters where there is no memory for that. Raises BudgetError."""
    climb = plan_climb(layers, job.num_layers)

    def lessons(train: str) -> Lessons:
        healing, lesson = _of_cuts(job, text, train, turn)
        course = _course_of_cuts(job, healing, lesson, layers, climb)
        return _planned(job, job, healing, lesson, course, climb, streaming)

    return _that_fits(lessons)


def told_with_cuts(
    job: Job, memory: MemoryPlan, text: FitText | None, layers: Sequence[PlanLayer], settings: RunSettings
) -> MemoryPlan:
    """``memory`` with what the last step of a repair of ``layers`` on ``text`` needs, if it has one; where there is no
    memory for that, a warning."""
    if text is None or settings.repair.chosen != "auto":
        return memory
    climb = plan_climb(layers, job.num_layers)
    if not climb.mended:
        return memory

    def needed(train: str) -> tuple[Kept, list[Need]]:
        course = _course_of_cuts(job, *_of_cuts(job, text, train), layers, climb)
        return healing_needs(job, course, settings.streaming)

    try:
        kept, needs = _that_fits(needed)
    except BudgetError as error:
        job.listener(WarningRaised(f"layers below cuts will not be trained end to end: {error}"))
        return memory
    return replace(memory, kept=kept, needs=(*memory.needs, *(replace(need, phase=BELOW_CUTS) for need in needs)))


def _that_fits(plan: Callable[[str], _T]) -> _T:
    """``plan`` of how layers below cuts are trained: whole, or by adapters where there is no memory for that. Raises
    BudgetError."""
    whole, adapters = CUT_RATES
    try:
        return plan(whole)
    except BudgetError as error:
        try:
            return plan(adapters)
        except OptionError:  # there is nothing to put them on
            raise error from None


def _course_of_cuts(job: Job, healing: Healing, text: HealText, layers: Sequence[PlanLayer], climb: Climb) -> Course:
    course = _course(job, healing, text, [layers[n].base for n in climb.mended])
    return replace(course, at_hand=sum(text.tokens))


def is_told(memory: MemoryPlan) -> bool:
    """Whether ``told_with_cuts`` has put the last step of a repair into the table."""
    return any(need.phase == BELOW_CUTS for need in memory.needs)


def _of_cuts(job: Job, text: FitText, train: str, turn: int = 0) -> tuple[Healing, HealText]:
    """How layers below cuts are trained, and on what."""
    compared, rate = EFFORTS["standard"].head_tokens(job.vocabulary), CUT_RATES[train][turn]
    healing = Healing(job.checkpoint.directory, train=train, rank=_CUT_RANK, rounds=CUT_ROUNDS, rate=rate)
    healing = replace(healing, loss_tokens=compared)
    every = max(-(-len(text.fit) // text.a_step) * CUT_ROUNDS // CUT_JUDGEMENTS, 1)
    healing = replace(healing, judge_every=every, patience=10 * CUT_JUDGEMENTS)  # a large rate is worse at first
    return healing, HealText(text.name, text.fit, text.held_out, text.a_step, text.call_tokens)


def _planned(
    job: Job, teacher: Job, healing: Healing, text: HealText, course: Course, climb: Climb | None, streaming: Streaming
) -> Lessons:
    teacher_memory, memory = plan_healing(job, teacher, course, streaming)
    return Lessons(teacher, healing, text, course, teacher_memory, memory, climb)


def _climb(job: Job, teacher: Job) -> Climb:
    """Where the checkpoint of ``job`` differs from the ``teacher``: what its plan says, if that is one of the teacher;
    else everywhere, and no cut is known."""
    path = job.checkpoint.directory / PLAN_FILE
    try:
        plan = Plan.load(path) if path.is_file() else None
    except PlanError:
        plan = None
    if plan is None or plan.fingerprint != teacher.checkpoint.fingerprint():
        return Climb(0, ())
    return plan_climb(plan.layers, teacher.num_layers)


def wanted_lessons(job: Job, settings: RunSettings) -> Lessons | None:
    """How a result of ``job`` is healed towards its source; None where it is not."""
    if not settings.also_heal.wanted:
        return None
    return lessons_of(job, job, settings.also_heal.towards(job.checkpoint.directory), settings.streaming)


def healing_disk(lessons: Lessons | None, size: int) -> int:
    """Bytes that healing takes on the way to a result of ``size``: what it keeps, and healed tensors."""
    return 0 if lessons is None else lessons.disk + size


def told_with(memory: MemoryPlan, lessons: Lessons | None) -> MemoryPlan:
    """``memory`` with what healing needs, which plans its own, in the table."""
    if lessons is None:
        return memory
    return replace(memory, needs=(*memory.needs, *(need for need in lessons.memory.needs if need.phase != "write")))


def sharing_meter(teacher: Job, job: Job) -> Job:
    """``teacher`` with what is read of it counted as ``job`` counts it."""
    return replace(teacher, meter=job.meter, source=ObservedSource(teacher.overlay, job.meter.read))


def _check_pair(job: Job, teacher: Job, healing: Healing) -> None:
    """Raise where one model cannot learn from the other."""
    if job.checkpoint.fingerprint() == teacher.checkpoint.fingerprint():
        raise OptionError(
            f"the teacher, {teacher.checkpoint.directory}, is the model itself; give the one before pruning"
        )
    if job.vocabulary != teacher.vocabulary:
        raise ModelError(
            f"the teacher has a vocabulary of {teacher.vocabulary}, the model {job.vocabulary}; give the one that it "
            "was pruned from"
        )
    ours, theirs = (load_tokenizer(one.checkpoint.directory, one.trust_remote_code) for one in (job, teacher))
    if ours.get_vocab() != theirs.get_vocab():
        raise CalibrationError(
            "the teacher's tokenizer is another than the model's; give the model that it was pruned from"
        )
    if healing.loss == "mse" and job.hidden_size != teacher.hidden_size:
        raise ModelError(
            f"the teacher's hidden states have {teacher.hidden_size} channels, the model's {job.hidden_size}; "
            "pass `loss=kl`"
        )


def _course(job: Job, healing: Healing, text: HealText, positions: Sequence[int]) -> Course:
    layers, layout = job.architecture.skeleton.layers, job.architecture.layout
    trained = whole = 0
    for position in positions:
        writable = layout.stored_whole(position)
        if healing.is_lora:
            trained += _adapter_numbers(layers[position], writable, healing)
        else:
            parameters = dict(layers[position].named_parameters())
            numbers = sum(parameters[name].numel() for name in writable)
            trained, whole = trained + numbers, max(whole, numbers)
    if healing.trains_head:
        if layout.tied_head:
            kind = healing.train.removesuffix("+head")
            raise OptionError(
                f"train is {healing.train}, but the head of this model is its embedding, which layers below see; pass "
                f"`train={kind}`"
            )
        trained += job.architecture.survey.head
    if trained == 0:
        what = f"no linear module is called {healing.targets}" if healing.targets else "there is nothing to train"
        names = sorted({path.rpartition(".")[2] for path in linear_modules(layers[0], layout.stored_whole(0))})
        raise OptionError(f"{what}; the linear modules of layer 0 are {', '.join(names) or 'none'}")
    teacher = min(sum(text.tokens), MOST_TOKENS)
    return Course(trained, whole, text.a_step * len(text.learn[0]), text.call_tokens, teacher, text.tokens[1])


def _adapter_numbers(layer: nn.Module, writable: dict[str, str], healing: Healing) -> int:
    shapes = linear_modules(layer, writable, healing.target_names).values()
    return sum(healing.rank * (outputs + inputs) for outputs, inputs, _ in shapes)
