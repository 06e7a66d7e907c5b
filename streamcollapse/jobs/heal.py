"""The job, top to bottom: heal a pruned checkpoint by distillation, with weights streamed up and down.

prepare     every check, before a weight is read
teacher     stream the original once over the text, keep what leaves its top
heal        steps of AdamW on adapters or whole layers, judged now and then; the best is kept
write       stream the healed tensors into a new checkpoint
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from streamcollapse.errors import OutputError
from streamcollapse.forward.batches import Batch
from streamcollapse.healing.learn import Lesson, Progress, Schedule, State, Watch, learn
from streamcollapse.healing.objective import Judge
from streamcollapse.healing.state import kept_teacher_states, load_progress, save_progress
from streamcollapse.healing.trained import Trained, adapted, as_masters
from streamcollapse.healing.updown import Student, visit
from streamcollapse.jobs.apply import Pruned, finished, write_pruned
from streamcollapse.jobs.prepare import Prepared
from streamcollapse.jobs.prepare_heal import PreparedHealing, prepare_heal
from streamcollapse.merge.healed import HealRecord
from streamcollapse.merge.plan import Plan, PlanLayer, original_layers
from streamcollapse.output.adapter import ADAPTER, write_adapter
from streamcollapse.output.report import Healed, Report
from streamcollapse.output.verdict import judge
from streamcollapse.progress import Listener, PhaseStarted, StepLearned, WarningRaised, silent
from streamcollapse.resources.device import heap_for
from streamcollapse.run.held_out import held_out_perplexities
from streamcollapse.run.opened import Run, open_run
from streamcollapse.run.refits import store_refits
from streamcollapse.run.request import output_work
from streamcollapse.run.work_directory import WorkDirectory
from streamcollapse.settings.heal import Healing
from streamcollapse.settings.run import RunSettings
from streamcollapse.storage.scratch import Scratch

_REFITS = "refits"  # in a work directory: healed tensors
_SAVE_SECONDS = 20.0  # the most that a kill loses, beside the step under way


def heal(
    pruned: str | Path,
    out: str | Path,
    healing: Healing,
    *,
    settings: RunSettings = RunSettings(),  # noqa: B008 - frozen
    listener: Listener = silent,
) -> Pruned:
    """Train the checkpoint ``pruned`` towards the model that it was pruned from, ``healing.teacher``, into the new
    directory ``out``: a checkpoint of the same shape, whose plan is one of ``pruned``.

    Raises StreamCollapseError for anything the input or the machine is at fault for, also where nothing was learned;
    ``out`` then does not exist, or is the older directory that ``settings.output.overwrite`` would have replaced.
    """
    return run_heal(prepare_heal(pruned, out, healing, settings, listener))


def run_heal(prepared: PreparedHealing) -> Pruned:
    """``heal`` as ``prepared``."""
    prepared.announce()
    request = prepared.request
    with output_work(request, prepared.key) as work:
        if work.has_finished(request.out):
            return finished(request.out)
        batches, steps, held_out = prepared.text.calls()
        states = _teacher(prepared, work, batches)
        with open_run(prepared.job, prepared.memory, work.path) as run:
            trained = _to_train(prepared, run)
            lesson = Lesson(batches, states, steps, held_out)
            progress = _learned(prepared, run, work, trained, lesson)
            plan = _plan(prepared, progress, _refits(prepared, run, work, trained))
            writing = Prepared(prepared.job, prepared.settings, prepared.memory, prepared.key, request.out, plan=plan)

            def finish(report: Report, stage: Path) -> None:
                report["healing"] = Healed(
                    losses=progress.losses,
                    judged={str(step): loss for step, loss in progress.judged.items()},
                    stopped=progress.stopped,
                )
                _judge(prepared, plan, report)
                if prepared.healing.adapter:
                    write_adapter(stage / ADAPTER, trained, prepared.job, prepared.healing)

            return write_pruned(writing, plan, run, work, finish)


def _teacher(prepared: PreparedHealing, work: WorkDirectory, batches: list[Batch]) -> list[torch.Tensor] | None:
    """What leaves the teacher's top for each call; None where the loss needs none."""
    if prepared.healing.loss == "nll":
        return None
    job, meter = prepared.teacher, prepared.job.meter
    with meter.phase("teacher"), heap_for(prepared.teacher_memory.activations):
        with open_run(job, prepared.teacher_memory, work.path) as run:
            job.listener(PhaseStarted("teacher", job.num_layers * prepared.teacher_passes))
            states = kept_teacher_states(work, run.model, batches)
        job.checkpoint.check_unchanged()
    return states


def _to_train(prepared: PreparedHealing, run: Run) -> Trained:
    """The masters, from what the checkpoint has."""
    healing, layers = prepared.healing, original_layers(run.job.num_layers)
    if healing.train == "lora":
        return adapted(run.model, layers, healing.rank, healing.scale_numerator, healing.target_names)
    positions, whole = healing.positions(len(layers)), dict[int, dict[str, torch.Tensor]]()

    def keep(position: int, weights: Any) -> None:
        names = [
            name
            for name in run.model.layout.stored_whole(layers[position].base)
            if weights.parameters[name].is_floating_point()
        ]
        whole[position] = as_masters(weights.parameters, names, run.job.placement.device)

    visit(run.model, layers, False, positions, keep)
    return Trained(whole=whole)


def _learned(prepared: PreparedHealing, run: Run, work: WorkDirectory, trained: Trained, lesson: Lesson) -> Progress:
    """The whole course, from where an earlier run was; the best of it is in ``trained``. Raises OutputError where
    nothing was learned."""
    healing, job = prepared.healing, run.job
    progress, masters = load_progress(work)
    if masters:
        trained.put(masters)
    scratch = work.files if prepared.memory.spill else Scratch()
    student = Student(run.model, original_layers(job.num_layers), False, trained, scratch)
    with job.meter.phase("heal"), heap_for(prepared.memory.activations):
        heads = (run.model.head(), prepared.teacher_head())
        judging = Judge(healing.loss, run.model, prepared.teacher_tail, heads, job.vocabulary, healing.temperature)
        schedule = prepared.schedule
        job.listener(PhaseStarted("heal", prepared.visits(student, progress)))
        watch = Watch(_telling(prepared), _saving(work, schedule))
        found = learn(student, judging, lesson, schedule, progress, watch)
    if found.best_step == 0:
        why = found.stopped or f"{found.step} steps"
        raise OutputError(
            f"nothing was learned ({why}): the loss on held-out text never fell below {found.best_loss:.4f}; give more "
            "text, or a lower `rate`; nothing was written"
        )
    if found.stopped is not None:
        job.listener(
            WarningRaised(f"ended after step {found.step}: {found.stopped}; that of {found.best_step} is kept")
        )
    return found


def _telling(prepared: PreparedHealing) -> Callable[[Progress], None]:
    began, first = time.monotonic(), -1

    def tell(progress: Progress) -> None:
        nonlocal first
        if first < 0:
            first = progress.step - 1
        made, seconds = progress.step - first, max(time.monotonic() - began, 1e-9)
        rate = made * prepared.text.a_step * len(prepared.text.learn[0]) / seconds
        judged = list(progress.judged.values())[-1]
        event = StepLearned(
            progress.step,
            prepared.schedule.steps,
            progress.losses[-1],
            judged,
            progress.best_loss,
            progress.best_step,
            rate,
        )
        prepared.job.listener(event)

    return tell


def _saving(work: WorkDirectory, schedule: Schedule) -> Callable[[Progress, State], None]:
    last = time.monotonic()

    def save(progress: Progress, masters: State) -> None:
        nonlocal last
        is_last = progress.step == schedule.steps or progress.stopped is not None
        if is_last or time.monotonic() - last >= _SAVE_SECONDS:
            save_progress(work, progress, masters)
            last = time.monotonic()

    return save


def _refits(prepared: PreparedHealing, run: Run, work: WorkDirectory, trained: Trained) -> dict[int, dict[str, str]]:
    """The healed tensors, rounded as they are stored, kept for the writer: their digests by position and suffix."""
    job, layers, found = run.job, original_layers(run.job.num_layers), dict[int, dict[str, str]]()

    def keep(position: int, weights: Any) -> None:
        suffixes = job.architecture.layout.stored_whole(position)
        results = trained.results(position, weights)
        tensors = {
            suffixes[name]: value.to(job.source.info(job.architecture.layout.name(position, suffixes[name])).dtype)
            for name, value in results.items()
        }
        found[position] = store_refits(job, work.path / _REFITS, tensors)

    with torch.no_grad():
        visit(run.model, layers, False, trained.positions, keep)
    return found


def _plan(prepared: PreparedHealing, progress: Progress, refits: dict[int, dict[str, str]]) -> Plan:
    job, healing, text = prepared.job, prepared.healing, prepared.text
    layers = tuple(
        PlanLayer(layer.base, layer.mix, refits.get(position, {})) if position in refits else layer
        for position, layer in enumerate(original_layers(job.num_layers))
    )
    is_lora = healing.train == "lora"
    record = HealRecord(
        train=healing.train,
        rank=healing.rank if is_lora else None,
        alpha=healing.scale_numerator if is_lora else None,
        loss=healing.loss,
        temperature=healing.temperature,
        teacher=prepared.teacher.name,
        teacher_fingerprint=prepared.teacher.checkpoint.fingerprint(),
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
    return Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), layers, heal=record)


def _judge(prepared: PreparedHealing, plan: Plan, report: Report) -> None:
    """Say in ``report`` what the healed model comes to beside the teacher on text of another kind."""
    text = prepared.held_out
    if text is None:
        return
    streaming = prepared.settings.streaming
    (before,) = held_out_perplexities(replace(prepared.teacher, meter=prepared.job.meter), text, [], streaming)
    unhealed, after = held_out_perplexities(prepared.job, text, [plan], streaming)
    report["held_out"] = judge(text.name, before, after)
    report["healing"]["unhealed"] = unhealed.nll
