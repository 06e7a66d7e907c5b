"""A job as it was asked for: what of it makes a difference to the result, and how to ask for it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamcollapse.errors import OptionError, OutputError, PlanError
from streamcollapse.merge.plan import Plan
from streamcollapse.run.opened import Job
from streamcollapse.run.workdir import JOB, read_document
from streamcollapse.settings.run import SAMPLES, Calibration, Compute, Output, RunSettings, Streaming
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.staging import work_of


@dataclass(frozen=True)
class Asked:
    """``prune`` by ``options`` on ``calibration``, or ``apply`` of ``plan``, of the open ``job`` into ``out``."""

    job: Job
    out: Path
    streaming: Streaming
    output: Output
    options: SearchOptions | None = None
    calibration: Calibration | None = None
    plan: Plan | None = None

    @property
    def work_dir(self) -> Path:
        """Where the run keeps what it finds out."""
        return work_of(self.out) if self.streaming.work_dir is None else Path(self.streaming.work_dir)

    @property
    def for_good(self) -> bool:
        """Whether the work directory is the user's, for other searches too."""
        return self.streaming.work_dir is not None

    def run(self) -> dict[str, Any]:
        """What tells two runs on the same source and samples apart."""
        options = None if self.options is None else asdict(self.options)
        return {"out": str(self.out.resolve()), "options": options, "max_shard_bytes": self.output.max_shard_bytes}

    def document(self) -> dict[str, Any]:
        """Everything that ``resume`` needs, as JSON types."""
        file = self.calibration.file if self.calibration else None
        return {
            "verb": "prune" if self.plan is None else "apply",
            "source": str(self.job.checkpoint.directory.absolute()),
            **self.run(),
            "calibration": file if file is None or file in SAMPLES else str(Path(file).absolute()),
            "max_tokens": self.calibration.max_tokens if self.calibration else None,
            "plan": None if self.plan is None else self.plan.to_json(),
            "device": str(self.job.placement.device),
            "compute_dtype": self.job.placement.dtype_name,
            "overwrite": self.output.overwrite,
            "streaming": {**asdict(self.streaming), "work_dir": self._given_work_dir()},
        }

    def _given_work_dir(self) -> str | None:
        return str(self.work_dir.absolute()) if self.for_good else None


@dataclass(frozen=True)
class Again:
    """What a work directory says of its job: the arguments of ``prune``, or of ``apply`` where there is a ``plan``."""

    source: str
    out: str
    options: SearchOptions
    plan: Plan | None
    settings: RunSettings


@dataclass(frozen=True)
class ConvertAgain:
    """What a work directory says of a conversion: the arguments of ``convert``."""

    source: str
    out: str
    dtype: str | None
    output: Output


def asked_before(work_dir: Path, trust_remote_code: bool) -> Again | ConvertAgain:
    """The job of the directory ``work_dir``. Raises OutputError where it is none, or says what no job can."""
    if not (work_dir / JOB).is_file():
        raise OutputError(f"{work_dir}: is no work directory of a run; give the one that its error named")
    found = read_document(work_dir / JOB)
    if found == {}:
        raise OutputError(f"{work_dir}: belongs to a search; run the same search command again to resume")
    try:
        output = Output(found["max_shard_bytes"], bool(found["overwrite"]))
        if found["verb"] == "convert":
            return ConvertAgain(str(found["source"]), str(found["out"]), found["dtype"], output)
        plan = found["plan"]
        return Again(
            source=str(found["source"]),
            out=str(found["out"]),
            options=SearchOptions(**found["options"] or {}),
            plan=None if plan is None else Plan.from_json(plan),
            settings=RunSettings(
                Compute(found["device"], found["compute_dtype"]),
                Calibration(found["calibration"], found["max_tokens"] or Calibration().max_tokens),
                Streaming(**found["streaming"]),
                output,
                trust_remote_code,
            ),
        )
    except (KeyError, TypeError, AttributeError, OptionError, PlanError) as error:
        raise OutputError(f"{work_dir / JOB}: is not what a run wrote ({error}); start the run again") from error
