"""Every check of healing before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from streamcollapse.errors import CalibrationError, ModelError, OptionError
from streamcollapse.forward.model import StreamedModel, Weights
from streamcollapse.healing.learn import Progress, Schedule
from streamcollapse.healing.teacher import MOST_TOKENS
from streamcollapse.healing.trained import linear_modules
from streamcollapse.healing.updown import Student
from streamcollapse.output.report import sizes
from streamcollapse.progress import Listener, silent
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.run.heal_plan import Course, plan_healing
from streamcollapse.run.heal_text import HealText, heal_text
from streamcollapse.run.held_out import HeldOut, held_out_text
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.run.opened import Job, open_job
from streamcollapse.run.request import Request
from streamcollapse.run.samples import load_tokenizer
from streamcollapse.run.saved_reference import work_key
from streamcollapse.settings.heal import Healing
from streamcollapse.settings.run import Compute, RunSettings
from streamcollapse.storage.disk import check_space
from streamcollapse.storage.index import local_path
from streamcollapse.storage.source import ObservedSource
from streamcollapse.storage.staging import check_output, staged_bytes
from streamcollapse.stream.loaders import PlainLoader
from streamcollapse.stream.weights import Limits, WeightStream


@dataclass(frozen=True)
class PreparedHealing:
    """Healing that may begin: everything about it is checked, nothing is written. ``job``: the pruned checkpoint;
    ``teacher``: the one it learns from; ``memory`` of both; ``course``: its size."""

    job: Job
    teacher: Job
    healing: Healing
    settings: RunSettings
    text: HealText
    held_out: HeldOut | None
    course: Course
    teacher_memory: MemoryPlan
    memory: MemoryPlan
    key: dict[str, Any]
    request: Request
    disk: int

    def announce(self) -> None:
        """Tell the listener how memory will be spent, as the run begins."""
        self.job.listener(self.memory.event)

    @property
    def schedule(self) -> Schedule:
        """The steps."""
        healing, a_round = self.healing, -(-len(self.text.learn) // self.text.a_step)
        steps = a_round * healing.rounds
        every = healing.judge_every or max(steps // 10, 1)
        warm_up = max(round(healing.warm_up * steps), 1)
        return Schedule(steps, healing.largest_rate, warm_up, healing.clip, every, healing.patience)

    @property
    def teacher_passes(self) -> int:
        """Passes over the teacher's weights, at the most."""
        return -(-sum(self.text.tokens) // MOST_TOKENS)

    def visits(self, student: Student, progress: Progress) -> int:
        """Layers that are still to be visited, up and down."""
        schedule, count = self.schedule, self.job.num_layers
        left = schedule.steps - progress.step
        a_step = 2 * count - 1 - student.trained.positions[0]
        judged = left // schedule.every + 1 + (progress.step == 0)
        return left * a_step + judged * count

    @cached_property
    def teacher_tail(self) -> StreamedModel:
        """The teacher's final norm and head, whose weights are read once."""
        job = self.teacher
        loader = PlainLoader(job.overlay, job.placement.device)
        return job.model(WeightStream(job.source, job.placement.device, loader, job.meter, Limits(0)))

    def teacher_head(self) -> Weights:
        """The weights of the teacher's head."""
        return self.teacher_tail.head()

    def to_json(self) -> dict[str, Any]:
        """What it would do, as JSON types."""
        tokens, held_out = self.text.tokens
        return {
            "tokens": tokens,
            "held_out_tokens": held_out,
            "steps": self.schedule.steps,
            "trained": self.course.trained,
            "disk": self.disk,
            "memory": self.memory.to_json(),
        }


def prepare_heal(
    pruned: str | Path, out: str | Path, healing: Healing, settings: RunSettings, listener: Listener = silent
) -> PreparedHealing:
    """``heal``, checked. Raises what it would raise before it begins."""
    check_source(pruned)
    check_source(healing.teacher)
    check_out(pruned, out, settings.streaming, settings.output)
    check_output(Path(out), local_path(healing.teacher), True)
    job = open_job(pruned, settings, listener)
    original = open_job(healing.teacher, settings, listener)
    original = replace(original, meter=job.meter, source=ObservedSource(original.overlay, job.meter.read))
    _check_pair(job, original, healing)
    text = heal_text(job, healing)
    course = _course(job, healing, text)
    teacher_memory, memory = plan_healing(job, original, course, settings.streaming)
    placement = job.placement
    request = Request(
        "heal",
        job.checkpoint.directory,
        Path(out),
        replace(settings, compute=Compute(str(placement.device), placement.dtype_name)),
        healing=replace(healing, teacher=original.checkpoint.directory.absolute()),
    )
    key = work_key(job, None, False) | {"teacher": original.checkpoint.fingerprint(), "healed on": text.digest}
    request.check_work(key)
    size = sizes(job.original(), job.num_layers).bytes
    disk = _disk(job, original, course, text, size, spill=memory.spill)
    check_space(Path(out), size + disk - staged_bytes(Path(out)))
    held_out = held_out_text(job, settings.judging.held_out) if settings.judging.verdict else None
    return PreparedHealing(
        job, original, healing, settings, text, held_out, course, teacher_memory, memory, key, request, size + disk
    )


def _check_pair(job: Job, teacher: Job, healing: Healing) -> None:
    """Raise where one model cannot learn from the other."""
    if job.checkpoint.fingerprint() == teacher.checkpoint.fingerprint():
        raise OptionError(
            f"the teacher, {teacher.checkpoint.directory}, is the model itself; give the one before pruning"
        )
    if job.vocabulary != teacher.vocabulary:
        raise ModelError(
            f"the teacher has a vocabulary of {teacher.vocabulary}, the model {job.vocabulary}; give the one "
            "that it was pruned from"
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


def _course(job: Job, healing: Healing, text: HealText) -> Course:
    positions = healing.positions(job.num_layers)
    layers = job.architecture.skeleton.layers
    trained = whole = 0
    for position in positions:
        writable = job.architecture.layout.stored_whole(position)
        if healing.train == "lora":
            trained += _adapter_numbers(layers[position], writable, healing)
        else:
            parameters = dict(layers[position].named_parameters())
            numbers = sum(parameters[name].numel() for name in writable)
            trained, whole = trained + numbers, max(whole, numbers)
    if trained == 0:
        what = f"no linear module is called {healing.targets}" if healing.targets else "there is nothing to train"
        names = sorted({path.rpartition(".")[2] for path in linear_modules(layers[0], writable)})
        raise OptionError(f"{what}; the linear modules of layer 0 are {', '.join(names) or 'none'}")
    length = len(text.learn[0])
    teacher = min(sum(text.tokens), MOST_TOKENS)
    return Course(trained, whole, text.a_step * length, text.call_tokens, teacher, text.tokens[1])


def _adapter_numbers(layer: nn.Module, writable: dict[str, str], healing: Healing) -> int:
    shapes: Sequence[tuple[int, int, bool]] = list(linear_modules(layer, writable, healing.target_names).values())
    return sum(healing.rank * (outputs + inputs) for outputs, inputs, _ in shapes)


def _disk(job: Job, teacher: Job, course: Course, text: HealText, size: int, spill: bool) -> int:
    """Bytes of the work directory: the teacher's states, what is saved between steps, and healed tensors."""
    item = job.placement.dtype.itemsize
    states = sum(text.tokens) * teacher.hidden_size * item
    between = (job.num_layers + 2) * course.tokens * job.hidden_size * item if spill else 0
    return states + between + 2 * 16 * course.trained + size
