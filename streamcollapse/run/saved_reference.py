"""The reference pass of a run: an earlier run's, where the work directory has it, or made now and saved there; and what
tells whether two runs can share one."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from streamcollapse.errors import OutputError
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.reference import Reference, reference_pass
from streamcollapse.run.opened import Job, Run
from streamcollapse.run.samples import Samples
from streamcollapse.run.work_directory import (
    FORMAT,
    REFERENCE,
    TemporaryWork,
    WorkDirectory,
    read_document,
    write_document,
)
from streamcollapse.storage.disk import disk_errors, to_disk
from streamcollapse.storage.index import CONFIG_FILE
from streamcollapse.storage.scratch import DiskScratch


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


def reference_of(run: Run, work: TemporaryWork, samples: Samples, starts: range) -> Reference:
    """The reference pass over ``samples``: of an earlier run, or now, with the boundaries in ``starts``."""
    model, batches = run.model, samples.batches
    if isinstance(work, WorkDirectory):
        starts = range(run.job.num_layers + 1)  # another search may start elsewhere
        if (found := _load(work, model, batches)) is not None:
            return found
    reference = run.stream.sparing(lambda: reference_pass(model, batches, starts, work.scratch))
    save_reference(run.job, work, reference)
    return reference


def save_reference(job: Job, work: TemporaryWork, reference: Reference) -> None:
    """A reference pass was made in ``work.scratch``: save it for another run, if there is a place for it."""
    job.checkpoint.check_unchanged()
    if isinstance(work, WorkDirectory):
        _save(work, reference)


def _save(directory: WorkDirectory, reference: Reference) -> None:
    """Save what the boundaries in the directory still lack to be used again."""
    tensors: dict[str, Any] = {}
    for b, (states, last) in enumerate(zip(reference.boundaries, reference.last_hidden, strict=True)):
        kept = directory.files.allocate(f"last_hidden-{b}", tuple(last.shape), last.dtype)
        kept.copy_(last)
        tensors |= {f"boundaries-{b}": _described(states), f"last_hidden-{b}": _described(kept)}
    with disk_errors(directory.path):
        for name in tensors:
            to_disk(directory.path / name)
    write_document(directory.path / REFERENCE, {"first": reference.first, "tensors": tensors})


def _load(directory: WorkDirectory, model: StreamedModel, batches: Sequence[Batch]) -> Reference | None:
    """The reference pass of an earlier run, if it is there, whole and as it was written. No layer is read."""
    try:
        found = read_document(directory.path / REFERENCE)
        boundaries = [_tensor(directory.files, found, f"boundaries-{b}") for b in range(len(batches))]
        device = model.placement.device
        last = [_tensor(directory.files, found, f"last_hidden-{b}").to(device) for b in range(len(batches))]
        first = int(found["first"])
    except (OutputError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        (directory.path / REFERENCE).unlink(missing_ok=True)
        return None
    calls = [recording.calls for recording in model.record(batches)]
    top = [states[-1].to(device) for states in boundaries]  # a work directory has all boundaries
    return Reference(batches, calls, first, boundaries, last, top)


def _tensor(files: DiskScratch, found: Mapping[str, Any], name: str) -> torch.Tensor:
    entry = found["tensors"][name]
    tensor = files.find(name, tuple(entry["shape"]), getattr(torch, entry["dtype"]))
    if _described(tensor) != entry:
        raise ValueError(name)
    return tensor


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    """What tells whether a tensor in a file is still the one that was written."""
    checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "crc32": checksum}
