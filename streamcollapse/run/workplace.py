"""Where a job keeps what it finds out: a work directory, or nowhere beyond its end."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from streamcollapse.arch.stored import CONFIG_FILE
from streamcollapse.errors import OutputError, StreamCollapseError, printable
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.reference import Reference, reference_pass
from streamcollapse.merge.plan import Decision
from streamcollapse.run.evaluations import Memory
from streamcollapse.run.keeping import kept_directory
from streamcollapse.run.memory_plan import Run
from streamcollapse.run.opened import Job, Samples
from streamcollapse.run.request import Asked
from streamcollapse.run.workdir import (
    FORMAT,
    REFERENCE,
    WorkDirectory,
    read_document,
    to_disk,
    write_whole,
)
from streamcollapse.settings.run import Streaming
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.disk import disk_errors
from streamcollapse.storage.rooms import InMemory, OnDisk, Room
from streamcollapse.storage.staging import work_of


@dataclass(frozen=True)
class WorkPlace:
    """``memory`` of candidates, ``room`` for hidden states, ``scratch`` for what goes at the end of the run; and the
    ``directory`` that outlives a crash, if there is one."""

    memory: Memory
    room: Room
    scratch: Path
    directory: WorkDirectory | None

    def reference(self, run: Run, samples: Samples, starts: range) -> Reference:
        """The reference pass: of an earlier run, or now, with the boundaries in ``starts``."""
        job, model, batches = run.job, run.model, samples.batches
        if self.directory is not None and (found := _found(self.directory, model, batches)) is not None:
            return found
        kept = starts if self.directory is None else range(job.num_layers + 1)  # another search may start elsewhere
        reference = run.stream.sparing(lambda: reference_pass(model, batches, kept, self.room))
        self.made(job, reference)
        return reference

    def made(self, job: Job, reference: Reference) -> None:
        """A reference pass was made in ``room``: kept for another run, if there is a place for it."""
        job.checkpoint.check_unchanged()
        if self.directory is not None:
            _keep(self.directory, reference)

    def decided(self, number: int, decision: Decision) -> None:
        """Decision ``number`` of the search has been taken."""
        if self.directory is not None:
            self.directory.decided(number, decision)

    def has_finished(self, out: Path) -> bool:
        """Whether an earlier run was broken off when ``out`` had got its name already."""
        return self.directory is not None and self.directory.has_finished(out)

    def take_up(self, stage: Path) -> set[str]:
        """The shards in ``stage`` that an earlier run has finished; whatever else is there is removed."""
        assert self.directory is not None, "an output is written with a work directory"
        return self.directory.take_up(stage)

    def shards(self) -> dict[str, str]:
        """sha256 of the shards of the output, by file name."""
        return {} if self.directory is None else self.directory.shards()

    def shard_done(self, name: str, sha256: str) -> None:
        """A shard of the output is on the disk."""
        if self.directory is not None:
            self.directory.shard_done(name, sha256)

    def mark(self, kind: str) -> None:
        """The output is about to get its name (``renaming``)."""
        if self.directory is not None:
            self.directory.mark(kind)


def work_key(job: Job, samples: Samples | None, merge_norms: bool, plan_digest: str | None = None) -> dict[str, Any]:
    """Everything besides the mixes that a similarity depends on; of a job without a search, its plan."""
    return {
        "format": FORMAT,
        "source": job.checkpoint.fingerprint(),
        "source_files": job.checkpoint.state(CONFIG_FILE),
        "calibration": None if samples is None else samples.digest,
        "plan": plan_digest,
        "compute_device": job.placement.device.type,
        "compute_dtype": job.placement.dtype_name,
        "merge_norms": merge_norms,
        "torch_version": str(torch.__version__),
        "transformers_version": str(transformers.__version__),
    }


@contextmanager
def kept_place(asked: Asked, key: Mapping[str, Any], passing: bool = False) -> Iterator[WorkPlace]:
    """The place of the job ``asked`` for, in a work directory (``kept_directory``). Raises OutputError."""
    with kept_directory(asked, key, passing) as directory:
        yield WorkPlace(directory.memory, directory.room, directory.path, directory)


@contextmanager
def search_place(
    key: Mapping[str, Any], options: SearchOptions | None, streaming: Streaming, spill: bool, save_as: Path | None
) -> Iterator[WorkPlace]:
    """The place of a search: the work directory that ``streaming`` names, or one beside ``save_as``, where its plan
    will be, until it is there; without either, one that goes with the run."""
    if streaming.work_dir is None and save_as is None:
        with passing_place(Path(tempfile.gettempdir()), spill) as place:
            yield place
        return
    for_good = streaming.work_dir is not None
    path = Path(streaming.work_dir) if streaming.work_dir is not None else work_of(save_as or Path())
    directory = WorkDirectory(path, key)
    with closing(directory):
        try:
            directory.begin({"search": None if options is None else asdict(options)}, {})
            yield WorkPlace(directory.memory, directory.room, path, directory)
        except (StreamCollapseError, OSError, KeyboardInterrupt) as error:
            if directory.is_worth_keeping():
                again = f"progress saved in {printable(path)}; run the same command again to resume"
                error.args = (f"{error}; {again}" if str(error) else again,)
            elif not for_good:
                directory.remove()
            raise
        directory.mark("complete") if for_good else directory.remove()


@contextmanager
def passing_place(scratch: Path, spill: bool) -> Iterator[WorkPlace]:
    """A place that goes with the run: hidden states in memory, or with ``spill`` in files in ``scratch``."""
    if not spill:
        yield WorkPlace(Memory(), InMemory(), scratch, None)
        return
    with tempfile.TemporaryDirectory(prefix=".streamcollapse-", dir=scratch) as temporary:
        yield WorkPlace(Memory(), OnDisk(Path(temporary)), scratch, None)


def _keep(directory: WorkDirectory, reference: Reference) -> None:
    """Keep what the boundaries in the directory still lack to be used again."""
    tensors: dict[str, Any] = {}
    for b, (states, last) in enumerate(zip(reference.boundaries, reference.last_hidden, strict=True)):
        kept = directory.room.make(f"last_hidden-{b}", tuple(last.shape), last.dtype)
        kept.copy_(last)
        tensors |= {f"boundaries-{b}": _described(states), f"last_hidden-{b}": _described(kept)}
    with disk_errors(directory.path):
        for name in tensors:
            to_disk(directory.path / name)
        write_whole(directory.path / REFERENCE, {"first": reference.first, "tensors": tensors})


def _found(directory: WorkDirectory, model: StreamedModel, batches: Sequence[Batch]) -> Reference | None:
    """The reference pass of an earlier run, if it is there, whole and as it was written. No layer is read."""
    try:
        found = read_document(directory.path / REFERENCE)
        boundaries = [_tensor(directory.room, found, f"boundaries-{b}") for b in range(len(batches))]
        device = model.placement.device
        last = [_tensor(directory.room, found, f"last_hidden-{b}").to(device) for b in range(len(batches))]
        first = int(found["first"])
    except (OutputError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        (directory.path / REFERENCE).unlink(missing_ok=True)
        return None
    calls = [recording.calls for recording in model.record(batches)]
    top = [states[-1].to(device) for states in boundaries]  # a work directory has all boundaries
    return Reference(batches, calls, first, boundaries, last, top)


def _tensor(room: OnDisk, found: Mapping[str, Any], name: str) -> torch.Tensor:
    entry = found["tensors"][name]
    tensor = room.find(name, tuple(entry["shape"]), getattr(torch, entry["dtype"]))
    if _described(tensor) != entry:
        raise ValueError(name)
    return tensor


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    """What tells whether a tensor in a file is still the one that was written."""
    checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "crc32": checksum}
