"""The step before a result is written: train its stack end to end towards the model that it was pruned from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from streamcollapse.errors import NothingLearnedError, OptionError
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.head import Head
from streamcollapse.healing.learn import Lesson, Progress, State, Watch, learn
from streamcollapse.healing.objective import Judge
from streamcollapse.healing.state import kept_states, load_progress, save_progress
from streamcollapse.healing.teacher import Layers, states_above, teacher_states
from streamcollapse.healing.trained import Adapting, Trained, adapted, as_masters
from streamcollapse.healing.updown import Student, visit
from streamcollapse.jobs.lessons import BELOW_CUTS, Lessons
from streamcollapse.merge.healed import HealRecord
from streamcollapse.merge.plan import Plan, PlanLayer
from streamcollapse.merge.view import MergedView
from streamcollapse.output.report import Healed
from streamcollapse.progress import PhaseStarted, StepLearned, WarningRaised
from streamcollapse.resources.device import heap_for, in_fixed_order
from streamcollapse.run.opened import Job, Run, open_run
from streamcollapse.run.refits import store_refits
from streamcollapse.run.work_directory import TemporaryWork, WorkDirectory
from streamcollapse.storage.scratch import Scratch

_REFITS = "refits"  # in a work directory: healed tensors
_SAVE_SECONDS = 20.0  # between saves, and so about what a kill loses, beside the step under way
_SAVE_SHARE = 0.05  # of the time; states of large models take longer than steps


@dataclass(frozen=True)
class HealedStack:
    """The ``plan`` after healing, what was ``trained``, and the ``course``, as reports have it."""

    plan: Plan
    trained: Trained
    course: Healed


def healed(job: Job, lessons: Lessons, plan: Plan, work: WorkDirectory) -> HealedStack:
    """``plan`` of the source of ``job`` with what ``lessons`` make of its tensors. Raises OutputError where nothing was
    learned, NonFiniteError."""
    states = _teacher(job, lessons, work)
    with open_run(job, lessons.memory, work.path) as run, job.meter.phase("heal"):
        return _healed(_Patient(run, lessons, plan, work), states)


def trained_below_cuts(
    run: Run, lessons: Lessons, plan: Plan, work: TemporaryWork, states: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> Plan:
    """``plan`` of the model of ``run`` with what ``lessons`` make of it, which say what stays in memory.
    ``states``: what left the top of the source for each call, and what enters the lowest layer below a cut. Raises
    NothingLearnedError, NonFiniteError."""
    with run.job.meter.phase(BELOW_CUTS):
        run.job.listener(PhaseStarted("layers below", len(lessons.positions(plan.layers))))
        return _healed(_Patient(run, lessons, plan, work, BELOW_CUTS), *states).plan


def _healed(
    patient: _Patient, states: list[torch.Tensor] | None, entering: list[torch.Tensor] | None = None
) -> HealedStack:
    """What becomes of the ``patient``, by the ``states`` of the teacher. ``entering``: what enters the lowest layer
    that is trained, None where that is not known yet."""
    lessons, plan = patient.lessons, patient.plan
    batches, steps, held_out = lessons.text.calls()
    patient.run.stream.keep(patient.resident_names())
    with heap_for(lessons.memory.activations), in_fixed_order(patient.run.job.placement.device):
        trained = patient.to_train()
        if entering is None:
            entering = patient.entering(trained.positions[0], batches)
        progress = patient.learned(trained, Lesson(batches, states, steps, held_out, entering))
        refits = patient.refits(trained)
    layers = tuple(
        PlanLayer(layer.base, layer.mix, {**layer.refits, **refits.get(position, {})})
        for position, layer in enumerate(plan.layers)
    )
    judged = {str(step): loss for step, loss in progress.judged.items()}
    course = Healed(losses=progress.losses, judged=judged, stopped=progress.stopped)
    return HealedStack(replace(plan, layers=layers, heal=_record(lessons, progress)), trained, course)


def _teacher(job: Job, lessons: Lessons, work: WorkDirectory) -> list[torch.Tensor] | None:
    """What leaves the teacher's top for each call; None where the loss needs none."""
    if lessons.healing.loss == "nll":
        return None
    teacher = lessons.teacher
    with job.meter.phase("teacher"), open_run(teacher, lessons.teacher_memory, work.path) as run:
        states = _states(lessons, run, work)
        teacher.checkpoint.check_unchanged()
    return states


def _states(lessons: Lessons, run: Run, work: TemporaryWork) -> list[torch.Tensor]:
    """What leaves the top of the teacher, whose ``run`` it is, for each call."""
    batches, _, _ = lessons.text.calls()
    with heap_for(lessons.teacher_memory.activations):
        run.job.listener(PhaseStarted("teacher", run.job.num_layers * lessons.passes))
        return kept_states(work, "teacher", lessons.teacher_identity, partial(teacher_states, run.model, batches))


@dataclass(frozen=True)
class _Patient:
    """The stack of ``plan``, while it is healed."""

    run: Run
    lessons: Lessons
    plan: Plan
    work: TemporaryWork
    phase: str = "heal"

    @property
    def _identity(self) -> str:
        return self.lessons.identity(self.plan.digest)

    def resident_names(self) -> set[str]:
        """The tensors of layers that stay on the device: the highest, which every step visits; not those of mixes."""
        plan, model, found = self.plan, self.run.model, set[str]()
        view = MergedView(model.stream.source, model.layout, plan.layers, plan.merge_norms)
        for position in range(max(len(plan.layers) - self.lessons.memory.resident_layers, 0), len(plan.layers)):
            found |= set(view.source_names(position)) if len(plan.layers[position].mix) == 1 else set()
        return found

    def to_train(self) -> Trained:
        """The masters, from what the stack has. Raises OptionError for layers that it has not."""
        healing, layers, model = self.lessons.healing, self.plan.layers, self.run.model
        positions = self.lessons.positions(layers)
        if healing.is_lora:
            how = Adapting(healing.rank, healing.scale_numerator, healing.target_names)
            trained = adapted(model, layers, positions, how)
            if not trained.positions:
                raise OptionError(f"no linear module is called {healing.targets}")
            return trained
        whole = dict[int, dict[str, torch.Tensor]]()

        def keep(position: int, weights: Any) -> None:
            names = model.layout.stored_whole(layers[position].base)
            floating = [name for name in names if weights.parameters[name].is_floating_point()]
            whole[position] = as_masters(weights.parameters, floating, model.placement.device)

        visit(model, layers, self.plan.merge_norms, positions, keep)
        return Trained(whole=whole, head=self._head() if healing.trains_head else {})

    def _head(self) -> dict[str, torch.Tensor]:
        """Masters of final norm and head: of what a gradient by logits reaches."""
        model = self.run.model
        weights = {name: weight.detach().clone() for name, weight in model.head(self.plan.layers[-1].refits).items()}
        device, dtype = model.placement.device, model.placement.dtype
        floating = [name for name, weight in weights.items() if weight.is_floating_point()]
        hidden_11D = torch.ones(1, 1, model.hidden_size, device=device, dtype=dtype)
        with torch.enable_grad():
            leaves = {name: weights[name].requires_grad_() for name in floating}
            logits = model.logits({**weights, **leaves}, hidden_11D)
            reached = torch.autograd.grad(logits.float().sum(), list(leaves.values()), allow_unused=True)
        names = [name for name, gradient in zip(floating, reached, strict=True) if gradient is not None]
        return as_masters(weights, names, device)

    def entering(self, lowest: int, batches: list[Batch]) -> list[torch.Tensor] | None:
        """What enters the layer at position ``lowest`` in each call, which no step changes; None where that is the
        embedding."""
        if lowest == 0:
            return None
        below = Layers(self.plan.layers[:lowest], self.plan.merge_norms)
        self.run.job.listener(PhaseStarted("layers below", lowest * self.lessons.passes))
        made = partial(states_above, self.run.model, below, batches)
        return kept_states(self.work, "entering", f"{self._identity} {lowest}", made)

    def learned(self, trained: Trained, lesson: Lesson) -> Progress:
        """The whole course, from where an earlier run was; the best of it is in ``trained``."""
        lessons, job = self.lessons, self.run.job
        progress, masters = load_progress(self.work, self._identity)
        if masters:
            trained.put(masters)
        student = self._student(trained)
        judge = self._judge(lesson, trained.head)
        job.listener(PhaseStarted(self.phase, lessons.visits(student, progress)))
        found = learn(student, judge, lesson, lessons.schedule, progress, Watch(self._telling(), self._saving()))
        self._check(found)
        return found

    def _student(self, trained: Trained) -> Student:
        memory, model = self.lessons.memory, self.run.model
        on_device = model.placement.device if memory.kept == "vram" else torch.device("cpu")
        scratch = self.work.files if memory.spill else Scratch(on_device)
        student = Student(model, self.plan.layers, self.plan.merge_norms, trained, scratch)
        view, above = student.view(), range(student.lowest, len(self.plan.layers))
        in_place = self.run.stream.loader.stays and all(model.is_in_place(view, position) for position in above)
        return replace(student, keeps_graphs=memory.kept == "graphs" and in_place)

    def _judge(self, lesson: Lesson, learned: dict[str, torch.Tensor]) -> Judge:
        lessons, job, model, tail = self.lessons, self.run.job, self.run.model, self.lessons.teacher_tail
        entering = lesson.entering or [model.record(lesson.batches[:1])[0].hidden_NTD]
        weights = model.head(self.plan.layers[-1].refits)
        weights |= {name: weights[name].clone() for name in learned}
        ours = Head(model, weights, job.vocabulary, entering[0][0, :1].to(model.placement.device))
        theirs = ours
        if (learned or job is not lessons.teacher) and lesson.teacher is not None:
            theirs = Head(tail, tail.head(), job.vocabulary, lesson.teacher[0][0, :1].to(model.placement.device))
        kind, temperature = lessons.healing.loss, lessons.healing.temperature
        return Judge(kind, model, tail, (ours, theirs), job.vocabulary, temperature, lessons.every, learned)

    def _check(self, found: Progress) -> None:
        if found.best_step == 0:
            why = found.stopped or f"{found.step} steps"
            raise NothingLearnedError(
                f"nothing was learned ({why}): the loss on held-out text never fell below {found.best_loss:.4f}; give "
                "more text, or a lower `rate`; nothing was written"
            )
        if found.stopped is not None:
            text = f"training ended after step {found.step}: {found.stopped}; that of {found.best_step} is kept"
            self.run.listener(WarningRaised(text))

    def _telling(self) -> Callable[[Progress], None]:
        lessons, began, first = self.lessons, time.monotonic(), None

        def tell(progress: Progress) -> None:
            nonlocal first
            first = progress.step - 1 if first is None else first
            seconds = max(time.monotonic() - began, 1e-9)
            rate = (progress.step - first) * lessons.course.tokens / seconds
            steps, loss, judged = lessons.schedule.steps, progress.losses[-1], list(progress.judged.values())[-1]
            best = progress.best_loss, progress.best_step
            self.run.listener(StepLearned(progress.step, steps, loss, judged, *best, rate))

        return tell

    def _saving(self) -> Callable[[Progress, State], None]:
        steps, due = self.lessons.schedule.steps, time.monotonic() + _SAVE_SECONDS

        def save(progress: Progress, masters: State) -> None:
            nonlocal due
            is_last, began = progress.step == steps or progress.stopped is not None, time.monotonic()
            if is_last or began >= due:
                save_progress(self.work, self._identity, progress, masters)
                now = time.monotonic()
                due = now + max(_SAVE_SECONDS, (now - began) / _SAVE_SHARE)

        return save

    def refits(self, trained: Trained) -> dict[int, dict[str, str]]:
        """The healed tensors, rounded as they are stored and kept for the writer: their digests by position, suffix."""
        job, layers, found = self.run.job, self.plan.layers, dict[int, dict[str, str]]()
        layout = job.architecture.layout

        def keep(position: int, weights: Any) -> None:
            base = layers[position].base
            suffixes = layout.stored_whole(base)
            tensors = {
                suffixes[name]: value.to(job.source.info(layout.name(base, suffixes[name])).dtype)
                for name, value in trained.results(position, weights).items()
            }
            found[position] = store_refits(job, self.work.path / _REFITS, tensors)

        with torch.no_grad():
            visit(self.run.model, layers, self.plan.merge_norms, trained.positions, keep)
            after = {
                f"/{layout.stored[name]}": master.to(job.source.info(layout.stored[name]).dtype)
                for name, master in trained.head.items()
            }
            top = len(layers) - 1
            found[top] = {**found.get(top, {}), **store_refits(job, self.work.path / _REFITS, after)}
        return found


def _record(lessons: Lessons, progress: Progress) -> HealRecord:
    healing, text = lessons.healing, lessons.text
    is_lora = healing.is_lora
    return HealRecord(
        train=healing.train,
        rank=healing.rank if is_lora else None,
        alpha=healing.scale_numerator if is_lora else None,
        loss=healing.loss,
        temperature=healing.temperature,
        teacher=lessons.teacher.name,
        teacher_fingerprint=lessons.teacher.checkpoint.fingerprint(),
        text=text.name,
        text_sha256=text.digest,
        tokens=text.tokens[0],
        held_out_tokens=text.tokens[1],
        rounds=healing.rounds,
        batch_tokens=healing.batch_tokens,
        rate=healing.largest_rate,
        steps=progress.step,
        best_step=progress.best_step,
        before=progress.judged[0],
        after=progress.best_loss,
    )
