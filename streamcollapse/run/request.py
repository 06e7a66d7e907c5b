"""A job as it was asked for: what of it makes a difference to the result, and how to ask for it again."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from streamcollapse.errors import OptionError, OutputError, PlanError, printable
from streamcollapse.merge.plan import Plan
from streamcollapse.run.text_names import absolute
from streamcollapse.run.work_directory import JOB, WorkDirectory, check_directory, read_document, work_directory
from streamcollapse.settings.heal import AlsoHeal, Healing
from streamcollapse.settings.run import SAMPLES, Calibration, Compute, Judging, Output, Repair, RunSettings, Streaming
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.locks import claimed
from streamcollapse.storage.staging import lock_of, make_parents, partial_of, work_of


@dataclass(frozen=True)
class Request:
    """``prune`` by ``options``, ``apply`` of ``plan``, ``heal`` by ``healing``, or ``convert`` to
    ``dtype``, of the directory ``source`` into ``out``. The device and dtype in ``settings`` are those that the job
    computes with."""

    verb: str
    source: Path
    out: Path
    settings: RunSettings
    options: SearchOptions | None = None
    plan: Plan | None = None
    dtype: str | None = None
    healing: Healing | None = None

    @property
    def work_dir(self) -> Path:
        """Where progress is saved."""
        given = self.settings.streaming.work_dir
        return work_of(self.out) if given is None else Path(given)

    @property
    def is_persistent(self) -> bool:
        """Whether the work directory is the user's, for other searches too, and stays when this job is done."""
        return self.settings.streaming.work_dir is not None

    def check_work(self, key: Mapping[str, Any]) -> None:
        """Raise OutputError unless a run of ``key`` may work in the work directory; that beside an output whose parents
        are still to be made may."""
        if self.is_persistent or self.work_dir.parent.is_dir():
            check_directory(self.work_dir, key)

    def run(self) -> dict[str, Any]:
        """What tells two runs on the same source and samples apart, as JSON types."""
        what: dict[str, Any] = {"dtype": self.dtype}
        if self.verb != "convert":
            what = {"options": None if self.options is None else asdict(self.options)}
            if self.settings.repair.is_wanted:
                what["repair"] = _repair_said(self.settings.repair)
            if self.settings.also_heal.wanted:
                what["also_heal"] = _also_said(self.settings.also_heal)
        if self.healing is not None:
            what["healing"] = _healing_said(self.healing)
        return {"out": str(self.out.resolve()), **what, "max_shard_bytes": self.settings.output.max_shard_bytes}

    def to_json(self) -> dict[str, Any]:
        """Everything that ``resume`` needs, as JSON types."""
        settings = self.settings
        document = {"verb": self.verb, "source": str(self.source.absolute()), **self.run()}
        document["overwrite"] = settings.output.overwrite
        if self.verb == "convert":
            return document
        file, held_out, verdict = settings.calibration.file, settings.judging.held_out, settings.judging.verdict
        return document | {
            "calibration": file if file is None or file in SAMPLES else absolute(file),
            "max_tokens": settings.calibration.max_tokens,
            "plan": None if self.plan is None else self.plan.to_json(),
            "plan_from": None if self.plan is None or self.plan.origin is None else str(self.plan.origin.absolute()),
            "repair": _repair_said(settings.repair),
            "also_heal": _also_said(settings.also_heal),
            "judging": {"held_out": None if held_out is None else str(Path(held_out).absolute()), "verdict": verdict},
            "device": settings.compute.device,
            "compute_dtype": settings.compute.dtype,
            "streaming": asdict(settings.streaming)
            | {"work_dir": str(self.work_dir.absolute()) if self.is_persistent else None},
        }


def _repair_said(repair: Repair) -> dict[str, Any]:
    file = None if repair.file is None else absolute(repair.file)
    return {"method": repair.chosen, "file": file, "tokens": repair.tokens}


def _also_said(healing: AlsoHeal) -> dict[str, Any]:
    return asdict(healing) | {"file": None if healing.file is None else absolute(healing.file)}


def _healing_said(healing: Healing) -> dict[str, Any]:
    file = None if healing.file is None else absolute(healing.file)
    return asdict(healing) | {"file": file, "teacher": str(healing.teacher)}


@contextmanager
def output_work(request: Request, key: Mapping[str, Any], resumable: bool = True) -> Iterator[WorkDirectory]:
    """The work directory of ``request``, which alone now makes its output. Unless it is ``resumable``, whoever asks
    removes all of it. Raises OutputError."""
    path, out = request.work_dir, request.out
    hint = f"progress saved; resume with: streamcollapse resume {printable(path)}" if resumable else ""
    make_parents(out)
    claim, persistent = claimed(lock_of(out), str(out)), request.is_persistent
    run, job = request.run(), request.to_json()
    with work_directory(path, key, run, job, persistent=persistent, hint=hint, claim=claim) as directory:
        try:
            yield directory
        except BaseException:
            if not directory.is_worth_keeping():
                shutil.rmtree(partial_of(out), ignore_errors=True)
            raise


def saved_request(work_dir: Path, trust_remote_code: bool) -> Request:
    """The job of the directory ``work_dir``. Raises OutputError where it is none, or says what no job can."""
    if not (work_dir / JOB).is_file():
        raise OutputError(f"{work_dir}: is no work directory of a run; give the one that its error named")
    found = read_document(work_dir / JOB)
    if found == {}:
        raise OutputError(f"{work_dir}: belongs to a search; run the same search command again to resume")
    try:
        verb, source, out = found["verb"], Path(str(found["source"])), Path(str(found["out"]))
        output = Output(found["max_shard_bytes"], bool(found["overwrite"]))
        if verb == "convert":
            return Request(verb, source, out, RunSettings(output=output), dtype=found["dtype"])
        plan = found["plan"]
        settings = RunSettings(
            Compute(found["device"], found["compute_dtype"]),
            Calibration(found["calibration"], found["max_tokens"] or Calibration().max_tokens),
            Streaming(**found["streaming"]),
            output,
            Judging(**found.get("judging", {})),
            Repair(**found.get("repair", {})),
            AlsoHeal(**found.get("also_heal", {})),
            trust_remote_code,
        )
        if verb == "heal":
            return Request(verb, source, out, settings, healing=Healing(**found["healing"]))
        options = SearchOptions(**found["options"] or {})
        if plan is not None:
            origin = found.get("plan_from")
            plan = replace(Plan.from_json(plan), origin=None if origin is None else Path(origin))
        return Request(verb, source, out, settings, options, plan)
    except (KeyError, TypeError, AttributeError, OptionError, PlanError) as error:
        raise OutputError(f"{work_dir / JOB}: is not what a run wrote ({error}); start the run again") from error
