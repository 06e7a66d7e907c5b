"""Many checkpoints: a file of jobs, done by workers side by side, one failing job leaving the others alone.

read        sources x settings -> tasks; what belongs together goes to one worker
run         submit, listen, try again where a worker was lost
report      what came of each task, in batch_report.json, kept up to date
"""

import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from streamcollapse.batches.figures import check_figures
from streamcollapse.batches.local import LocalEngine, machines
from streamcollapse.batches.spec import read_jobs
from streamcollapse.batches.tasks import (
    Chain,
    Describe,
    Liken,
    Predict,
    Prune,
    Task,
    chains_of,
    is_about_others,
    result_key,
)
from streamcollapse.batches.worker import (
    INTERPRETER_BYTES,
    STATE,
    ChainEnded,
    Engine,
    FromChain,
    JobEnded,
    Machine,
    Message,
    Outcome,
    Place,
    WorkerLost,
    finished,
    is_ours,
    prepare_task,
    settings_of,
    source_version,
)
from streamcollapse.errors import JobsError, OutputError, StreamCollapseError, printable
from streamcollapse.jobs.convert import PreparedConversion
from streamcollapse.jobs.inspect import inspect
from streamcollapse.jobs.prepare import Prepared
from streamcollapse.output.report import versions
from streamcollapse.progress import silent
from streamcollapse.run.needs import peak_bytes
from streamcollapse.searches.registry import strategy_of
from streamcollapse.searches.strategy import fewest_layers
from streamcollapse.settings.run import Cluster, Compute, RunSettings, Streaming
from streamcollapse.storage.disk import disk_errors, write_whole
from streamcollapse.storage.hub import local_directory
from streamcollapse.storage.locks import lock
from streamcollapse.units import parse_bytes

REPORT_FILE = "batch_report.json"


@dataclass(frozen=True)
class BatchResult:
    """What came of a batch: an outcome for each task, in the order of the file."""

    out: Path
    outcomes: list[Outcome]
    report: dict[str, Any]

    @property
    def num_failed(self) -> int:
        return sum(outcome.status == "failed" for outcome in self.outcomes)


def batch(
    jobs: str | Path,
    out: str | Path | None = None,
    *,
    cluster: Cluster = Cluster(),  # noqa: B008 - frozen
    settings: RunSettings = RunSettings(),  # noqa: B008
    listener: Callable[[Message], None] = lambda message: None,
) -> BatchResult:
    """Do what the file ``jobs`` says, with the results in directories of ``out`` (None: what the file says).

    What an earlier batch has finished is left as it is. Of ``settings`` count the device, how weights are streamed, and
    whether code that comes with a checkpoint is run; what differs from job to job is in the file.
    ``streaming.work_dir`` is where searches of one source find what others found out; None for a place in ``out`` that
    is removed once everything is done. A task that fails is an outcome; raises StreamCollapseError for what concerns
    all of them.
    """
    streaming, device, trust_remote_code = settings.streaming, settings.compute.device, settings.trust_remote_code
    tasks, place = planned(jobs, out, streaming)
    chains, record = chains_of(tasks), _Record(place, tasks)
    with closing(_engine(chains, place, cluster, device, streaming, trust_remote_code)) as engine, _alone(place):
        for message in _run(engine, chains, cluster.retries):
            if isinstance(message, JobEnded):
                record.add(message.outcome)
            listener(message)
        if streaming.work_dir is None and not record.batch().num_failed:
            shutil.rmtree(place.work, ignore_errors=True)
    return record.batch()


def preview(
    jobs: str | Path,
    out: str | Path | None,
    *,
    settings: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> BatchResult:
    """An outcome for each task of the file ``jobs``: kept (done already), ready, or failed with what it would fail of.

    Sources on the Hub are fetched into its cache. Raises what ``batch`` would raise.
    """
    tasks, place = planned(jobs, out, settings.streaming)
    streaming = replace(settings.streaming, work_dir=None)
    machine = Machine(settings.compute.device, streaming, None, settings.trust_remote_code)
    outcomes = {task.name: _checked(task, place, machine) for task in tasks}
    return BatchResult(place.out, list(outcomes.values()), batch_report(place, tasks, outcomes, 0.0))


def _checked(task: Task, place: Place, machine: Machine) -> Outcome:
    out = place.out / task.name
    try:
        directory = local_directory(task.source, silent)
        known = finished(task, place, result_key(task, source_version(directory)))
        if known is not None:
            return known
        # Where results go does not exist yet; what is asked of a place is asked of the nearest one that does.
        stand_in = out if place.out.is_dir() else _nearest(place.out) / f".{task.name}"
        is_ours(out)
        if isinstance(task.work, Predict | Liken | Describe):
            check_figures(task.work, directory, settings_of(task, machine))
            return Outcome(task.name, "ready", str(out))
        figures = _expected(prepare_task(task, directory, stand_in, machine, None))
    except StreamCollapseError as error:
        return Outcome(task.name, "failed", str(out), printable(error))
    return Outcome(task.name, "ready", str(out), figures=figures)


def _expected(prepared: Prepared | PreparedConversion) -> dict[str, Any]:
    """What a job that is ready will make, and take: layers and bytes at the least, memory, and time."""
    if isinstance(prepared, PreparedConversion):
        before, after = prepared.found.before, prepared.found.after
        return {"bytes": {"before": sum(before.values()), "after": sum(after.values())}}
    timed, space = prepared.timed(even_if_short=False), prepared.space
    assert space is not None
    memory = prepared.memory
    return {
        "layers": {"before": prepared.job.num_layers, "after": len(fewest_layers(strategy_of(space.options), space))},
        "bytes": {"before": prepared.largest_output, "after": prepared.smallest_output},
        "ram": peak_bytes(memory.needs, "ram"),
        "vram": peak_bytes(memory.needs, "vram"),
        "seconds": None if timed.expected is None else timed.expected.total,
    }


def _nearest(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.is_dir())


def planned(jobs: str | Path, out: str | Path | None, streaming: Streaming) -> tuple[tuple[Task, ...], Place]:
    """The tasks of the file ``jobs``, and where their results go. Raises JobsError."""
    read = read_jobs(Path(jobs))
    chosen = read.out if out is None else Path(out)
    if chosen is None:
        raise JobsError(f"{jobs}: does not say where results go; add out: DIR, or pass `out`")
    target = chosen.resolve()
    for task in read.tasks:
        if Path(task.source) == target:
            raise JobsError(f"{chosen}: is a source as well; choose another directory for the results")
    work = target / STATE / "work" if streaming.work_dir is None else Path(streaming.work_dir).resolve()
    return read.tasks, Place(target, work)


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Make the directories; refuse a second batch in them."""
    with disk_errors(place.out):
        (place.out / STATE).mkdir(parents=True, exist_ok=True)
    path = place.out / STATE / "lock"
    with disk_errors(path), path.open("w") as file:
        if not lock(file):
            raise OutputError(f"{place.out}: in use by another batch; wait for it to finish or choose another `out`")
        yield


def _engine(
    chains: Sequence[Chain], place: Place, cluster: Cluster, device: str, streaming: Streaming, trust: bool
) -> Engine:
    if cluster.engine == "local":
        return LocalEngine(machines(device, cluster.workers, len(chains), streaming, trust), place)
    from streamcollapse.batches.on_ray import RayEngine

    kinds = {(t.source, t.work.compute_dtype) for chain in chains for t in chain if isinstance(t.work, Prune)}
    budget = streaming.ram_budget or max((_least_bytes(*kind, trust) for kind in kinds), default=1)
    machine = Machine(device, replace(streaming, ram_budget=budget), None, trust)
    ram_bytes = parse_bytes(budget) + INTERPRETER_BYTES
    return RayEngine(machine, place, cluster.ray_address, cluster.workers, ram_bytes)


def _least_bytes(source: str, compute_dtype: str, trust_remote_code: bool) -> int:
    """What pruning ``source`` needs at the least, and a quarter more; 1 where that cannot be told: its worker will say
    why."""
    try:
        settings = RunSettings(Compute("cpu", compute_dtype), trust_remote_code=trust_remote_code)
        return inspect(source, settings=settings).peak_bytes * 5 // 4
    except StreamCollapseError:
        return 1


def _run(engine: Engine, chains: Sequence[Chain], retries: int) -> Iterator[Message]:
    """Every message of every task; an JobEnded for each in the end."""
    waiting = deque(enumerate(chains))
    running: dict[int, list[Task]] = {}
    lost: Counter[str] = Counter()
    while waiting or running:
        while waiting and engine.is_free() and not (running and is_about_others(waiting[0][1])):
            number, chain = waiting.popleft()
            running[number] = list(chain)
            engine.submit(number, chain)
        for report in engine.reports():
            match report:
                case FromChain(number, message):
                    if isinstance(message, JobEnded):
                        running[number] = [t for t in running[number] if t.name != message.outcome.name]
                        attempts = lost[message.outcome.name] + 1
                        message = JobEnded(replace(message.outcome, attempts=attempts))
                    yield message
                case ChainEnded(number):
                    del running[number]
                case WorkerLost(number, reason):
                    left = running.pop(number)
                    task = left[0]  # the one that it was at
                    lost[task.name] += 1
                    if lost[task.name] > retries:
                        yield JobEnded(Outcome(task.name, "failed", "", reason, attempts=lost[task.name]))
                        left = left[1:]
                    if left:
                        waiting.appendleft((number, tuple(left)))


class _Record:
    """The outcomes so far, in a file that is whole at any time."""

    def __init__(self, place: Place, tasks: Sequence[Task]) -> None:
        self._place, self._tasks = place, tasks
        self._outcomes: dict[str, Outcome] = {}
        self._start = time.perf_counter()

    def add(self, outcome: Outcome) -> None:
        self._outcomes[outcome.name] = replace(outcome, out=str(self._place.out / outcome.name))
        write_whole(self._place.out / REPORT_FILE, json.dumps(self._report(), indent=2) + "\n")

    def batch(self) -> BatchResult:
        outcomes = [self._outcomes[task.name] for task in self._tasks if task.name in self._outcomes]
        return BatchResult(self._place.out, outcomes, self._report())

    def _report(self) -> dict[str, Any]:
        return batch_report(self._place, self._tasks, self._outcomes, time.perf_counter() - self._start)


def batch_report(
    place: Place, tasks: Sequence[Task], outcomes: Mapping[str, Outcome], seconds: float
) -> dict[str, Any]:
    """What ``batch_report.json`` holds, as JSON types; a task without an outcome is waiting."""
    jobs = []
    for task in tasks:
        outcome = outcomes.get(task.name)
        came = {"status": "waiting"} if outcome is None else asdict(outcome)
        jobs.append({**came, "name": task.name, "source": task.source, **task.settings()})
    return {
        "format": "streamcollapse.batch/1",
        "versions": versions(),
        "out": str(place.out),
        "seconds": seconds,
        "counts": dict(Counter(job["status"] for job in jobs)),
        "jobs": jobs,
    }
