"""What a batch consists of: one task for each source and setting, and which tasks go well together."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamcollapse.errors import CalibrationError
from streamcollapse.run.text_names import is_of_hub, matching
from streamcollapse.searches.registry import usual_repair
from streamcollapse.settings.heal import AlsoHeal
from streamcollapse.settings.run import SAMPLES, Calibration, EvaluationText, Judging, Repair
from streamcollapse.settings.search import SearchOptions


@dataclass(frozen=True)
class Prune:
    """Prune by complete ``options`` on ``calibration``, computing in ``compute_dtype``; how the result is mended by
    ``repair`` and ``also_heal``, and how it is judged."""

    options: SearchOptions
    calibration: Calibration
    compute_dtype: str
    judging: Judging = Judging()  # noqa: RUF009 - frozen
    repair: Repair = Repair()  # noqa: RUF009
    also_heal: AlsoHeal = AlsoHeal()  # noqa: RUF009


@dataclass(frozen=True)
class Convert:
    """Write as safetensors, in ``dtype`` (None: what each tensor is)."""

    dtype: str | None


@dataclass(frozen=True)
class Predict:
    """Say how well ``text`` is predicted, computing in ``compute_dtype``."""

    text: EvaluationText
    compute_dtype: str


@dataclass(frozen=True)
class Liken:
    """Say how alike the layers are, by ``options`` on ``calibration``, computing in ``compute_dtype``."""

    options: SearchOptions
    calibration: Calibration
    compute_dtype: str


@dataclass(frozen=True)
class Describe:
    """Write a page about all results of the source in this batch, computing in ``compute_dtype``."""

    compute_dtype: str


Work = Prune | Convert | Predict | Liken | Describe
_VERBS: dict[type, str] = {
    Prune: "prune",
    Convert: "convert",
    Predict: "perplexity",
    Liken: "similarity",
    Describe: "report",
}


@dataclass(frozen=True)
class Task:
    """One result to be made, a checkpoint or figures: ``name`` is the directory's, ``source`` an absolute path or a Hub
    id."""

    name: str
    source: str
    work: Work
    max_shard_size: str

    @property
    def verb(self) -> str:
        return _VERBS[type(self.work)]

    def settings(self) -> dict[str, Any]:
        """Everything that makes a difference to the result, as JSON types."""
        said = _plain(asdict(self.work))
        if isinstance(self.work, Prune):
            repair = self.work.repair
            said["repair"]["method"] = repair.chosen if repair.is_given else usual_repair(self.work.options)
            if said["repair"]["method"] == "none":  # as it was before there were repairs
                del said["repair"]
        if not said.get("also_heal", {}).get("wanted", True):
            del said["also_heal"]
        return {"verb": self.verb, "max_shard_size": self.max_shard_size, **said}


Chain = tuple[Task, ...]


def chains_of(tasks: Sequence[Task]) -> list[Chain]:
    """``tasks`` in groups that one worker takes one after the other.

    Searches of one source on the same samples share its reference pass and the memory of evaluated candidates, so they
    are a group; order is kept, but pages come last: they are about the others.
    """
    groups: dict[object, list[Task]] = {}
    for task in tasks:
        work = task.work
        if isinstance(work, Prune):
            shared = (task.source, work.calibration, work.compute_dtype, work.options.merge_norms)
            groups.setdefault(shared, []).append(task)
        else:
            groups[task.name, task.source] = [task]
    return sorted(map(tuple, groups.values()), key=is_about_others)


def is_about_others(chain: Chain) -> bool:
    """Whether it waits until everything else is done."""
    return isinstance(chain[0].work, Describe)


def result_key(task: Task, version: str) -> str:
    """What tells whether a result is the one that ``task`` asks for of this ``version`` of its source. Raises
    CalibrationError."""
    return _digest({"source": version, "samples": _samples_digest(task.work), **task.settings()})


def search_key(work: Prune, version: str, device: str) -> str:
    """What tells whether two searches can share what they find out. Raises CalibrationError."""
    from streamcollapse.output.report import versions  # imports torch, which reading a file of jobs does not need

    shared = [version, _samples_digest(work), work.calibration.max_tokens, work.compute_dtype, device, versions()]
    return _digest([*shared, work.options.merge_norms])[:16]


def _samples_digest(work: Work) -> str | None:
    if isinstance(work, Convert | Describe):
        return None
    file = work.text.file if isinstance(work, Predict) else work.calibration.file
    if file is None or file in SAMPLES or is_of_hub(file):
        return str(file)
    digest = hashlib.sha256()
    for path in matching(file):
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    plain = {key: _plain(value) if isinstance(value, dict) else value for key, value in document.items()}
    return {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()}
