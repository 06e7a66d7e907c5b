"""Rows of gpu_day.py on what mends a cut: a repair, and steps of healing with all weights streamed up and down."""

from __future__ import annotations

import shutil
import time

from gpu_bench import Bench
from gpu_rows import Finding
from gpu_runs import described_peaks, peaks, seconds_of, within_limits

from streamcollapse import Healing, Plan
from streamcollapse.errors import NothingLearnedError
from streamcollapse.jobs.apply import run_apply
from streamcollapse.jobs.healing import healed
from streamcollapse.jobs.lessons import lessons_of
from streamcollapse.jobs.prepare import prepare_apply
from streamcollapse.merge.plan import original_layers
from streamcollapse.progress import Event, StepLearned
from streamcollapse.run.opened import Job, open_job
from streamcollapse.run.work_directory import WorkDirectory
from streamcollapse.settings.run import Judging, Repair, RunSettings
from streamcollapse.units import format_bytes, format_seconds

PHASES = ("repair", "end to end", "repair check")


def repair(bench: Bench, shape: str, tokens: int, vram: int | None = None) -> Finding:
    """A quarter of the layers cut out of the middle, and ``--repair auto`` on ``tokens`` of the text that ships. The
    weights are random, so that what it gives back says nothing."""
    text = Repair("auto", None, bench.pick(tokens, 2048))
    how = RunSettings(
        bench.compute(), bench.calibration(), bench.streaming(vram), judging=Judging(verdict=False), repair=text
    )
    before, out = bench.before(), bench.place / "out"
    job = open_job(bench.source(shape), how)
    done = run_apply(prepare_apply(bench.source(shape), _cut(job), out, how))
    shutil.rmtree(out)
    usage, record = done.report["usage"], done.plan.repair
    assert record is not None
    used = peaks(usage, before)
    each = ", ".join(f"{name} {format_seconds(seconds_of(usage, name))}" for name in PHASES)
    words = f"{record.tokens} tokens in {format_seconds(seconds_of(usage, *PHASES))} ({each}); {described_peaks(used)}"
    figures = {"usage": usage, "repair": record.to_json(), "peaks": used}
    return Finding(words, figures, holds=None if vram is None else bench.rehearsal or within_limits(used, vram))


def heal(
    bench: Bench, shape: str, steps: int, batch_tokens: int, vram: int | None = None, ram: int | None = None
) -> Finding:
    """``steps`` of healing with low-rank adapters, a quarter of the layers cut out, and the teacher's pass before."""
    a_step = bench.pick(batch_tokens, 512)
    how = RunSettings(bench.compute(), bench.calibration(), bench.streaming(vram, ram))
    length = bench.pick(512, 128)
    course = Healing(
        bench.source(shape), tokens=steps * a_step * 17 // 16, length=length, batch_tokens=a_step, judge_every=steps
    )
    times: list[float] = []

    def listener(event: Event) -> None:
        if isinstance(event, StepLearned):
            times.append(time.perf_counter())
            bench.note(steps=len(times))

    before = bench.before()
    job = open_job(bench.source(shape), how, listener)
    lessons = lessons_of(job, job, course, how.streaming)
    work = WorkDirectory(bench.place / "work", {})
    try:
        healed(job, lessons, _cut(job), work)
    except NothingLearnedError:
        if not times:
            raise  # holes have no gradients, but losses
    finally:
        work.close()
    usage = job.meter.summary()
    used = peaks(usage, before)
    each = (times[-1] - times[0]) / max(len(times) - 1, 1)
    rate = a_step / each if each else float("nan")
    words = f"{len(times)} steps of {a_step} tokens, {format_seconds(each)} each: {rate:.0f} tokens/s; the teacher's "
    words += f"pass over {sum(lessons.text.tokens)} tokens {format_seconds(seconds_of(usage, 'teacher'))}; "
    words += f"{format_bytes(usage['bytes_read'])} read; {described_peaks(used)}"
    figures = {"usage": usage, "seconds_of_a_step": each, "tokens_per_second": rate, "peaks": used}
    figures |= {"memory": lessons.memory.to_json(), "times": [one - times[0] for one in times]}
    return Finding(words, figures, holds=None if vram is None else within_limits(used, vram, ram))


def _cut(job: Job) -> Plan:
    """The source of ``job`` without a quarter of its layers, in the middle."""
    count, layers = job.num_layers // 4, original_layers(job.num_layers)
    first = (job.num_layers - count) // 2
    kept = (*layers[:first], *layers[first + count :])
    return Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), kept)
