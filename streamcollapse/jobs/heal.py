"""The job, top to bottom: heal a pruned checkpoint by distillation, with weights streamed up and down.

prepare     every check, before a weight is read (prepare_heal.py)
teacher     stream the original once over the text, keep what leaves its top
heal        steps of AdamW on adapters or whole layers, judged now and then; the best is kept (healing.py)
write       stream the healed tensors into a new checkpoint
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamcollapse.jobs.apply import Pruned, finished, write_pruned
from streamcollapse.jobs.healing import HealedStack, healed
from streamcollapse.jobs.prepare import Prepared
from streamcollapse.jobs.prepare_heal import PreparedHealing, prepare_heal
from streamcollapse.merge.plan import Plan, original_layers
from streamcollapse.output.adapter import ADAPTER, write_adapter
from streamcollapse.output.report import Report
from streamcollapse.output.verdict import judge
from streamcollapse.progress import Listener, silent
from streamcollapse.run.held_out import held_out_perplexities
from streamcollapse.run.opened import open_run
from streamcollapse.run.request import output_work
from streamcollapse.settings.heal import Healing
from streamcollapse.settings.run import RunSettings


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
    job, lessons, request = prepared.job, prepared.lessons, prepared.request
    with output_work(request, prepared.key) as work:
        if work.has_finished(request.out):
            return finished(request.out)
        whole = Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), original_layers(job.num_layers))
        outcome = healed(job, lessons, whole, work)
        writing = Prepared(job, prepared.settings, lessons.memory, prepared.key, request.out, plan=outcome.plan)

        def finish(report: Report, stage: Path) -> None:
            report["healing"] = outcome.course
            _judge(prepared, outcome, report)
            if lessons.healing.adapter:
                write_adapter(stage / ADAPTER, outcome.trained, job, lessons.healing)

        with open_run(job, replace(lessons.memory, resident_layers=0), work.path) as run:
            return write_pruned(writing, outcome.plan, run, work, finish)


def _judge(prepared: PreparedHealing, outcome: HealedStack, report: Report) -> None:
    """Say in ``report`` what the healed model comes to beside the teacher on text that it did not learn from."""
    text, streaming = prepared.held_out, prepared.settings.streaming
    if text is None:
        return
    (before,) = held_out_perplexities(prepared.lessons.teacher, text, [], streaming)
    unhealed, after = held_out_perplexities(prepared.job, text, [outcome.plan], streaming)
    report["held_out"] = judge(text.name, before, after)
    report["healing"]["unhealed"] = unhealed.nll
