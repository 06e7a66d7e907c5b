"""Every check of healing a checkpoint, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamcollapse.jobs.lessons import Lessons, lessons_of, sharing_meter
from streamcollapse.merge.plan import original_layers
from streamcollapse.output.report import sizes
from streamcollapse.progress import Listener, TimeExpected, silent
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.run.held_out import HeldOut, held_out_text
from streamcollapse.run.opened import Job, open_job
from streamcollapse.run.request import Request
from streamcollapse.run.samples import Samples
from streamcollapse.run.saved_reference import work_key
from streamcollapse.run.timing import probe
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.heal import Healing
from streamcollapse.settings.run import Compute, RunSettings
from streamcollapse.storage.disk import check_space
from streamcollapse.storage.index import local_path
from streamcollapse.storage.staging import check_output, staged_bytes


@dataclass(frozen=True)
class PreparedHealing:
    """Healing that may begin: everything about it is checked, nothing is written. ``job``: the pruned checkpoint;
    ``held_out``: the text that judges the result, None where nothing does; ``disk``: bytes on the way, with the
    result."""

    job: Job
    lessons: Lessons
    settings: RunSettings
    held_out: HeldOut | None
    key: dict[str, Any]
    request: Request
    disk: int
    expected: TimeExpected | None = None

    def announce(self) -> None:
        """Tell the listener how memory will be spent, and how long it will take, as the run begins."""
        self.job.listener(self.lessons.memory.event)
        if self.expected is not None:
            self.job.listener(self.expected)

    def timed(self) -> PreparedHealing:
        """The same, with how long it will take, by a probe of a few seconds."""
        lessons, job = self.lessons, self.job
        batches, steps, _ = lessons.text.calls()
        samples = Samples([batches[n] for n in steps[0]], "")
        rates = probe(job, samples, lessons.memory, ("kl", EFFORTS["quick"]), self.request.out.parent, True)
        lowest = lessons.positions(original_layers(job.num_layers))[0]
        phases = lessons.expected(rates.run / samples.num_tokens, rates.word, job.num_layers, lowest)
        phases["write"] = [(self.disk / 2 * rates.written, 0.0)]
        return replace(self, expected=TimeExpected(tuple((name, tuple(found)) for name, found in phases.items())))

    def to_json(self) -> dict[str, Any]:
        """What it would do, as JSON types."""
        tokens, held_out = self.lessons.text.tokens
        return {
            "tokens": tokens,
            "held_out_tokens": held_out,
            "steps": self.lessons.schedule.steps,
            "trained": self.lessons.course.trained,
            "disk": self.disk,
            "memory": self.lessons.memory.to_json(),
            "expected_seconds": None if self.expected is None else self.expected.seconds,
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
    teacher = sharing_meter(open_job(healing.teacher, settings, listener), job)
    lessons = lessons_of(job, teacher, healing, settings.streaming)
    placement = job.placement
    request = Request(
        "heal",
        job.checkpoint.directory,
        Path(out),
        replace(settings, compute=Compute(str(placement.device), placement.dtype_name)),
        healing=replace(healing, teacher=teacher.checkpoint.directory.absolute()),
    )
    key = work_key(job, None, False)
    request.check_work(key)
    size = sizes(job.original(), job.num_layers).bytes
    disk = 2 * size + lessons.disk  # healed tensors, and the checkpoint that has them
    check_space(Path(out), disk - staged_bytes(Path(out)))
    held_out = held_out_text(job, settings.judging.held_out) if settings.judging.verdict else None
    return PreparedHealing(job, lessons, settings, held_out, key, request, disk)
