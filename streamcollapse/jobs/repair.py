"""The step between search and write: fit the layers before cuts to what the source hands on above them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from streamcollapse.errors import BudgetError, NothingLearnedError
from streamcollapse.forward.perplexity import streamed_perplexities
from streamcollapse.forward.walk import Stack, schedule
from streamcollapse.jobs.healing import trained_below_cuts
from streamcollapse.jobs.lessons import is_told, lessons_of_cuts
from streamcollapse.jobs.prepare import Prepared
from streamcollapse.jobs.repair_journal import RepairJournal
from streamcollapse.merge.plan import Plan, PlanLayer
from streamcollapse.merge.repaired import RepairedLayer, RepairRecord
from streamcollapse.progress import PhaseStarted, WarningRaised
from streamcollapse.repair.climb import plan_climb
from streamcollapse.repair.fits import fit_by
from streamcollapse.repair.mend import How, mend
from streamcollapse.resources.device import heap_for, in_fixed_order
from streamcollapse.run.fit_text import FitText
from streamcollapse.run.opened import Run
from streamcollapse.run.work_directory import TemporaryWork
from streamcollapse.settings.heal import Healing
from streamcollapse.storage.scratch import Scratch


def repaired(prepared: Prepared, plan: Plan, run: Run, work: TemporaryWork) -> Plan:
    """``plan`` with the layers before cuts fitted anew, as the settings say; where that does not lower the loss on text
    that was not fitted to, only a record of it. Raises OutputError, NonFiniteError."""
    text, job, method = prepared.fit_text, run.job, prepared.settings.repair.chosen
    if text is None:
        return plan
    journal = RepairJournal(
        run, work, plan, {"plan": plan.digest, "repair": method, "text": text.digest, "block": run.memory.gram_block}
    )
    if (known := journal.whole()) is not None:
        return known
    with job.meter.phase("repair"), heap_for(run.memory.activations):
        to_top, above = method == "auto", method == "magnitude"
        job.listener(PhaseStarted("repair", len(plan_climb(plan.layers, job.num_layers, to_top, above).steps)))
        how = How(
            fit_by(method, run.memory.gram_block),
            journal.keep,
            (lambda position: None) if above else journal.known,  # what is above goes by what was done below
            plan.merge_norms,
            to_top=to_top,
            above=above,
        )
        device = job.placement.device
        scratch = work.scratch if run.memory.spill else Scratch(device)
        with in_fixed_order(device):
            outcome = run.stream.sparing(lambda: mend(run.model, plan.layers, text.batches, how, scratch))
        found = tuple(RepairedLayer(one.position, one.how, one.before, one.after) for one in outcome.done)
    layers = outcome.layers
    if found and method == "auto":
        states = [one.cpu() for one in outcome.top], [one.cpu() for one in outcome.entering]
        outcome = replace(outcome, top=[], entering=[])  # a device has better use for the memory
        layers, found = _end_to_end(prepared, run, replace(plan, layers=layers), states, found, work)
    with job.meter.phase("repair check"), heap_for(run.memory.activations):
        losses = _losses(run, plan, layers, text) if layers != plan.layers else (None, None)
    is_kept = losses[0] is not None and losses[1] is not None and losses[1] < losses[0]
    tokens, held_out = text.tokens
    record = RepairRecord(method, text.name, text.digest, tokens, held_out, *losses, is_kept, found)
    if not is_kept:
        job.listener(WarningRaised(f"not repaired: {_why_not(record)}"))
    result = replace(plan, layers=layers if is_kept else plan.layers, repair=record)
    journal.complete(result)
    return result


def _end_to_end(
    prepared: Prepared,
    run: Run,
    fitted: Plan,
    states: tuple[list[torch.Tensor], list[torch.Tensor]],
    found: tuple[RepairedLayer, ...],
    work: TemporaryWork,
) -> tuple[tuple[PlanLayer, ...], tuple[RepairedLayer, ...]]:
    """The layers of ``fitted``, those below cuts trained on the divergence of next-token distributions by the
    ``states`` (trained_below_cuts), and what was done with each, where that lowers it and there is memory for it; else
    as they are."""
    text = prepared.fit_text
    assert text is not None
    for turn in range(2):
        run.stream.keep_none()  # before it is asked what memory there is
        try:
            lessons = lessons_of_cuts(run.job, text, fitted.layers, prepared.settings.streaming, turn)
            way = _way(lessons.healing, run, warns=turn == 0)
            layers = trained_below_cuts(run, lessons, fitted, work, states).layers
        except BudgetError as error:
            if is_told(run.memory):
                run.job.listener(WarningRaised(f"layers below cuts were not trained end to end: {error}"))
            break
        except NothingLearnedError:
            continue
        finally:
            run.stream.keep_none()
        said = [f"{one.how}; {way}" if one.how else way for one in found]
        return layers, tuple(replace(one, how=how) for one, how in zip(found, said, strict=True))
    return fitted.layers, found


def _way(healing: Healing, run: Run, warns: bool) -> str:
    """How layers below cuts are trained, in words."""
    if not healing.is_lora:
        return "end to end"
    if warns:
        text = f"layers below cuts get adapters of rank {healing.rank}, since there is no memory to train them whole"
        run.job.listener(WarningRaised(text))
    return f"end to end, by adapters of rank {healing.rank}"


def _losses(run: Run, plan: Plan, layers: Any, text: FitText) -> tuple[float | None, float | None]:
    """Of the plan as it was, and with ``layers``, on what was held out."""
    job = run.job
    job.listener(PhaseStarted("repair check", len(schedule([Stack(plan.layers, 0), Stack(layers, 0)]))))
    stacks, norms = [plan.layers, layers], [plan.merge_norms] * 2
    found = streamed_perplexities(run.model, stacks, norms, text.windows, job.vocabulary, text.call_tokens)
    before, after = (one.nll if one.nll < float("inf") else None for one in found)
    return before, after


def _why_not(record: RepairRecord) -> str:
    is_above = record.method == "magnitude"
    if not record.layers:
        return "no layer stays above one that was cut out" if is_above else "no layers were cut out"
    if all(layer.how is None for layer in record.layers):
        if is_above:
            return "these layers have no tensors that only scale what they add (norms after the sub-layers, or experts)"
        return "no layer before a cut comes nearer to what the source hands on"
    if record.loss_before is None or record.loss_after is None:
        return "the loss on text that it was not fitted to is infinite"
    losses = f"{record.loss_after:.4f} instead of {record.loss_before:.4f}"
    return f"the loss on text that it was not fitted to would be {losses}"
