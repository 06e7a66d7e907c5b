"""The course of healing: steps of AdamW over the calls of a text, judged now and then on text that was held out.

All state between two steps is in masters, moments and a few numbers, so that what is saved after a step goes on to the
same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from streamcollapse.forward.batches import Batch
from streamcollapse.healing.objective import Judge
from streamcollapse.healing.trained import Trained
from streamcollapse.healing.updown import Student

_BETAS = (0.9, 0.95)
_SEED = 31
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Lesson:
    """Text in calls of a layer, and what left the top of the teacher in each; ``steps`` are the numbers of the calls of
    a step. The calls ``held_out`` judge. ``entering``: what enters the lowest layer that is trained in each call; None
    where nothing is below it."""

    batches: Sequence[Batch]
    teacher: Sequence[torch.Tensor] | None
    steps: Sequence[Sequence[int]]
    held_out: Sequence[int]
    entering: Sequence[torch.Tensor] | None = None


@dataclass(frozen=True)
class Schedule:
    """``steps`` in all, at a learning ``rate`` that rises over ``warm_up`` of them and falls by a cosine to none;
    gradients are cut to a norm of ``clip``. Judged every ``every`` steps; the end comes sooner after ``patience``
    judgements without a better one (None: it does not)."""

    steps: int
    rate: float
    warm_up: int
    clip: float
    every: int
    patience: int | None = None

    def rate_at(self, step: int) -> float:
        """The learning rate of 0-based ``step``."""
        risen = min(1.0, (step + 1) / max(self.warm_up, 1))
        return self.rate * risen * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


@dataclass
class Progress:
    """How far it has come: ``step`` steps made; ``judged`` has the loss on what is held out by the number of steps
    before it, ``losses`` that of each step; ``best`` are the masters that were best, after ``best_step``."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    judged: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    best: State = field(default_factory=dict)
    moments: State = field(default_factory=dict)
    stopped: str | None = None

    @property
    def best_loss(self) -> float:
        """The least loss on what is held out."""
        return self.judged[self.best_step]


@dataclass(frozen=True)
class Watch:
    """Who is told: ``stepped`` after each step, ``judged`` after each judgement; ``save`` may keep the progress and the
    masters."""

    stepped: Callable[[Progress], None]
    save: Callable[[Progress, State], None]


def learn(
    student: Student, judge: Judge, lesson: Lesson, schedule: Schedule, progress: Progress, watch: Watch
) -> Progress:
    """Train what the student has to train, from ``progress`` on, and leave the best of it in the masters."""
    masters = student.trained.tensors
    groups = _groups(student.trained)
    adam = torch.optim.AdamW(groups, lr=schedule.rate, betas=_BETAS, weight_decay=0.0, fused=True)
    _put_moments(adam, masters, progress.moments, progress.step)
    if not progress.judged:
        _judge(student, judge, lesson, progress)
    while progress.step < schedule.steps and progress.stopped is None:
        loss = _step(student, judge, lesson, schedule, progress.step, adam)
        if not math.isfinite(loss):
            progress.stopped = f"the loss of step {progress.step + 1} is not finite"
            break
        progress.losses.append(loss)
        progress.step += 1
        watch.stepped(progress)
        if progress.step % schedule.every == 0 or progress.step == schedule.steps:
            _judge(student, judge, lesson, progress)
            since = sum(step > progress.best_step for step in progress.judged)
            if schedule.patience is not None and since >= schedule.patience:
                progress.stopped = f"no better for {since} judgements"
        progress.moments = _moments(adam, masters)
        watch.save(progress, {name: master.detach() for name, master in masters.items()})
    student.trained.put(progress.best)
    return progress


def _groups(trained: Trained) -> list[dict[str, Any]]:
    """The masters by what their learning rate is in units of."""
    found: dict[float, list[torch.Tensor]] = {}
    for name, master in trained.tensors.items():
        found.setdefault(trained.units.get(name, 1.0), []).append(master)
    return [{"params": masters, "unit": unit} for unit, masters in found.items()]


def order(step: int, count: int) -> int:
    """Whose calls of ``count`` steps' step ``step`` takes: each once in a round, in an order that is the round's."""
    generator = torch.Generator().manual_seed(_SEED + step // count)
    return int(torch.randperm(count, generator=generator)[step % count])


def _step(
    student: Student, judge: Judge, lesson: Lesson, schedule: Schedule, step: int, adam: torch.optim.Optimizer
) -> float:
    numbers = lesson.steps[order(step, len(lesson.steps))]
    for group in adam.param_groups:
        group["lr"] = group["unit"] * schedule.rate_at(step)
    adam.zero_grad(set_to_none=True)
    loss = _loss((student.gradients, judge), lesson, numbers, step)
    parameters = [p for group in adam.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
    if not math.isfinite(float(norm)):
        return math.nan
    adam.step()
    return loss


def _judge(student: Student, judge: Judge, lesson: Lesson, progress: Progress) -> None:
    loss = _loss((student.losses, judge), lesson, lesson.held_out, judge.every // 2)
    progress.judged[progress.step] = loss
    if progress.step == 0 or loss < progress.best_loss:
        progress.best_step = progress.step
        progress.best = {name: master.detach().clone() for name, master in student.trained.tensors.items()}


def _loss(how: tuple[Callable[..., float], Judge], lesson: Lesson, numbers: Sequence[int], turn: int) -> float:
    """The loss over the calls with these ``numbers``. ``how``: one of a student's ways, and what judges."""
    way, judge = how
    judge.refresh()
    batches = [lesson.batches[n] for n in numbers]
    places = [judge.places(batch, turn) for batch in batches]
    tokens = sum(len(row) for rows in places for row in rows)

    def objective(b: int, left: torch.Tensor, gradient: bool) -> tuple[float, torch.Tensor | None]:
        states = None if lesson.teacher is None else lesson.teacher[numbers[b]]
        return judge.loss_of(batches[b], places[b], left, states, tokens, gradient)

    entering = None if lesson.entering is None else [lesson.entering[n] for n in numbers]
    return way(batches, entering, objective)


def _moments(adam: torch.optim.Optimizer, masters: Mapping[str, torch.Tensor]) -> State:
    found: State = {}
    for name, master in masters.items():
        if state := adam.state.get(master):
            found[f"{name}.first"], found[f"{name}.second"] = state["exp_avg"], state["exp_avg_sq"]
    return found


def _put_moments(adam: torch.optim.Optimizer, masters: Mapping[str, torch.Tensor], moments: State, step: int) -> None:
    for name, master in masters.items():
        if f"{name}.first" in moments:
            adam.state[master] = {
                "step": torch.tensor(float(step), device=master.device),
                "exp_avg": moments[f"{name}.first"].to(master.device),
                "exp_avg_sq": moments[f"{name}.second"].to(master.device),
            }
