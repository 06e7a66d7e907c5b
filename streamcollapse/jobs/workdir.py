"""A work directory: what a search has found out, for the next search on the same source and samples.

    run.json             what the directory belongs to
    evaluations.jsonl    a line for each evaluated candidate, keyed by a digest of its mixes
    reference.json       written once the hidden states below are complete
    boundaries-*, last_hidden-*    hidden states of the original model, one file for each batch

Evaluations do not depend on threshold, rule, C or I, so a search with other settings reads only what is new.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from streamcollapse.errors import OutputError, printable
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.reference import Reference, reference_pass
from streamcollapse.jobs.opening import Job, Samples
from streamcollapse.merge.plan import StackKey
from streamcollapse.settings import Streaming
from streamcollapse.storage.locks import lock
from streamcollapse.storage.rooms import InMemory, OnDisk, Room
from streamcollapse.storage.writer import disk_errors
from streamcollapse.stream.weights import WeightStream

FORMAT = "streamcollapse.work/1"
_RUN, _EVALUATIONS, _REFERENCE, _LOCK = "run.json", "evaluations.jsonl", "reference.json", "lock"


@dataclass(frozen=True)
class Evaluation:
    """What came of a candidate; ``reason`` says why where there is no similarity."""

    similarity: float | None
    reason: str | None = None


class Memory:
    """Evaluated candidates by what they are: for one run."""

    def __init__(self) -> None:
        self._known: dict[StackKey, Evaluation] = {}

    def get(self, key: StackKey) -> Evaluation | None:
        return self._known.get(key)

    def add(self, found: Mapping[StackKey, Evaluation]) -> None:
        self._known.update(found)


class WorkDirectory(Memory):
    """The directory ``path``, made if it is not there.

    Raises OutputError when it belongs to another source, other samples or another way of computing, or is no work
    directory.
    """

    def __init__(self, path: Path, job: Job, samples: Samples, merge_norms: bool) -> None:
        super().__init__()
        self.path = path
        self._own(_run_key(job, samples, merge_norms))
        self.room = OnDisk(path)
        self._digests = self._load_evaluations()

    def _own(self, key: dict[str, Any]) -> None:
        _check(self.path, key)
        with disk_errors(self.path):
            self.path.mkdir(exist_ok=True)
            self._lock = (self.path / _LOCK).open("w")
        if not lock(self._lock):
            self._lock.close()
            raise OutputError(
                f"{printable(self.path)}: another run works here; wait for it or choose another --work-dir"
            )
        if not (self.path / _RUN).exists():
            with disk_errors(self.path):
                _write_whole(self.path / _RUN, key)

    def close(self) -> None:
        """Let others work here."""
        self._lock.close()

    def _load_evaluations(self) -> dict[str, Evaluation]:
        path = self.path / _EVALUATIONS
        if not path.exists():
            return {}
        with disk_errors(path):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # a torn last line is dropped
        found = {}
        for line in lines:
            try:
                entry = json.loads(line)
                similarity, reason = entry["similarity"], entry["reason"]
                sound = reason is None and type(similarity) in (int, float) and -1.0 <= similarity <= 1.0
                if sound or (similarity is None and isinstance(reason, str)):
                    found[str(entry["stack"])] = Evaluation(similarity, reason)
            except (ValueError, KeyError, TypeError):
                continue  # what cannot be read is evaluated again
        return found

    def get(self, key: StackKey) -> Evaluation | None:
        return super().get(key) or self._digests.get(_digest(key))

    def add(self, found: Mapping[StackKey, Evaluation]) -> None:
        super().add(found)
        path = self.path / _EVALUATIONS
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            if file.tell() and not path.read_bytes().endswith(b"\n"):
                file.write("\n")
            for key, value in found.items():
                entry = {"stack": _digest(key), "similarity": value.similarity, "reason": value.reason}
                file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_reference(self, reference: Reference) -> None:
        """Keep what the boundaries in ``room`` still lack to be used again."""
        tensors: dict[str, Any] = {}
        for b, (states, last) in enumerate(zip(reference.boundaries, reference.last_hidden, strict=True)):
            kept = self.room.make(f"last_hidden-{b}", tuple(last.shape), last.dtype)
            kept.copy_(last)
            tensors |= {f"boundaries-{b}": _described(states), f"last_hidden-{b}": _described(kept)}
        with disk_errors(self.path):
            for name in tensors:
                _to_disk(self.path / name)
            _write_whole(self.path / _REFERENCE, {"first": reference.first, "tensors": tensors})

    def find_reference(self, model: StreamedModel, batches: Sequence[Batch]) -> Reference | None:
        """The reference pass of an earlier run, if it is there, whole and as it was written. No layer is read."""
        try:
            found = _read_json(self.path / _REFERENCE)
            boundaries = [self._tensor(found, f"boundaries-{b}") for b in range(len(batches))]
            last = [self._tensor(found, f"last_hidden-{b}").to(model.placement.device) for b in range(len(batches))]
            first = int(found["first"])
        except (OutputError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            (self.path / _REFERENCE).unlink(missing_ok=True)
            return None
        calls = [recording.calls for recording in model.record(batches)]
        return Reference(batches, calls, first, boundaries, last)

    def _tensor(self, found: Mapping[str, Any], name: str) -> torch.Tensor:
        entry = found["tensors"][name]
        tensor = self.room.find(name, tuple(entry["shape"]), getattr(torch, entry["dtype"]))
        if _described(tensor) != entry:
            raise ValueError(name)
        return tensor


@dataclass(frozen=True)
class WorkPlace:
    """Where a search keeps what it finds out: in ``directory``, or nowhere beyond its end."""

    job: Job
    samples: Samples
    memory: Memory
    room: Room
    directory: WorkDirectory | None

    def reference(self, model: StreamedModel, stream: WeightStream, starts: range) -> Reference:
        """The reference pass: of an earlier run, or now, with the boundaries in ``starts``."""
        job, batches = self.job, self.samples.batches
        if self.directory is not None and (found := self.directory.find_reference(model, batches)) is not None:
            return found
        kept = starts if self.directory is None else range(job.num_layers)  # another search may start elsewhere
        layout = job.architecture.layout
        reference = reference_pass(model, stream, layout, batches, kept, job.meter, job.listener, self.room)
        if self.directory is not None:
            self.directory.keep_reference(reference)
        return reference


@contextmanager
def work_place(
    job: Job, samples: Samples, streaming: Streaming, merge_norms: bool, spill: Path | None
) -> Iterator[WorkPlace]:
    """The place that ``streaming`` names; without one, memory, or a temporary directory in ``spill`` for states."""
    if streaming.work_dir is not None:
        directory = WorkDirectory(Path(streaming.work_dir), job, samples, merge_norms)
        with closing(directory):
            yield WorkPlace(job, samples, directory, directory.room, directory)
    elif spill is None:
        yield WorkPlace(job, samples, Memory(), InMemory(), None)
    else:
        with tempfile.TemporaryDirectory(prefix=".streamcollapse-", dir=spill) as temporary:
            yield WorkPlace(job, samples, Memory(), OnDisk(Path(temporary)), None)


def _run_key(job: Job, samples: Samples, merge_norms: bool) -> dict[str, Any]:
    """Everything besides the mixes that a similarity depends on."""
    return {
        "format": FORMAT,
        "source": job.checkpoint.fingerprint(),
        "calibration": samples.digest,
        "compute_device": job.placement.device.type,
        "compute_dtype": job.placement.dtype_name,
        "merge_norms": merge_norms,
        "torch_version": str(torch.__version__),
        "transformers_version": str(transformers.__version__),
    }


def _digest(key: StackKey) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    """What tells whether a tensor in a file is still the one that was written."""
    checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "crc32": checksum}


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_work_directory(streaming: Streaming, job: Job, samples: Samples, merge_norms: bool) -> None:
    """Raise OutputError unless a search may work in the directory that ``streaming`` names; changes nothing."""
    if streaming.work_dir is not None:
        _check(Path(streaming.work_dir), _run_key(job, samples, merge_norms))


def _check(path: Path, key: dict[str, Any]) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"{printable(path)}: is not a directory; choose another --work-dir")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{printable(path.parent)}: does not exist; create it first")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(path)}: cannot be written to; choose another --work-dir")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / _RUN).exists() and {entry.name for entry in path.iterdir()} - {_LOCK, f"{_RUN}.partial"}:
        raise OutputError(f"{printable(path)}: holds other files; choose another --work-dir")
    if not (path / _RUN).exists():
        return
    found = _read_json(path / _RUN)
    for name, value in key.items():
        if found.get(name) != value:
            raise OutputError(
                f"{printable(path)}: belongs to another run: its {name.replace('_', ' ')} is "
                f"{_short(found.get(name))}, this one's is {_short(value)}; choose another --work-dir"
            )


def _short(value: object) -> str:
    text = printable(value)
    return text if len(text) <= 20 else f"{text[:12]}…"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{printable(path)}: cannot be read; choose another --work-dir") from error
    if not isinstance(found, dict):
        raise OutputError(f"{printable(path)}: is not what a work directory holds; choose another --work-dir")
    return found


def _write_whole(path: Path, document: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _to_disk(partial)
    partial.replace(path)
