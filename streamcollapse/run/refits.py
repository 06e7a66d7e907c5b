"""Where refitted tensors are: files of a run, a file beside a plan that is kept without weights, or the checkpoint that
was written with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from streamcollapse.errors import CheckpointError, PlanError
from streamcollapse.merge.plan import Plan, PlanLayer
from streamcollapse.merge.view import check_plan, refit_name
from streamcollapse.run.opened import Job
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.disk import disk_errors, to_disk
from streamcollapse.storage.extents import Location
from streamcollapse.storage.header import read_header
from streamcollapse.storage.source import TensorInfo
from streamcollapse.storage.staging import make_parents

_CPU = torch.device("cpu")


def digest_of(tensor: torch.Tensor) -> str:
    """sha256 of the bytes of ``tensor`` as it would be stored, in hexadecimal."""
    return hashlib.sha256(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def store_refits(job: Job, directory: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Keep ``tensors``, by suffix, in files of ``directory``, where ``job`` finds them; their digests. Raises
    OutputError."""
    found: dict[str, str] = {}
    for suffix, tensor in tensors.items():
        placed = tensor.contiguous().cpu()
        found[suffix] = digest = digest_of(placed)
        path = directory / digest
        with disk_errors(path, needed=placed.nbytes):
            directory.mkdir(exist_ok=True)
            path.write_bytes(placed.reshape(-1).view(torch.uint8).numpy().data)
            to_disk(path)
        job.overlay.add(refit_name(digest), Location(path, 0, TensorInfo(placed.dtype, tuple(placed.shape))))
    return found


def find_stored(job: Job, directory: Path, layers: Iterable[PlanLayer]) -> bool:
    """Let ``job`` find the refits of ``layers`` in files of ``directory``; False where one is not there as it was."""
    for layer in layers:
        for suffix, digest in layer.refits.items():
            info = job.source.info(job.architecture.layout.name(layer.base, suffix))
            path = directory / digest
            if not path.is_file() or path.stat().st_size != info.num_bytes:
                return False
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                return False
            job.overlay.add(refit_name(digest), Location(path, 0, info))
    return True


def refits_file(plan_path: Path) -> Path:
    """The file with the refits of the plan at ``plan_path``, beside it."""
    return plan_path.with_name(f"{plan_path.stem}_refits.safetensors")


def save_refits(job: Job, plan: Plan, plan_path: Path) -> None:
    """Write the refits of ``plan`` beside the plan, by digest; nothing where it has none. Raises OutputError."""
    digests = {digest for layer in plan.layers for digest in layer.refits.values()}
    if not digests:
        return
    path = refits_file(plan_path)
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        save_file({digest: job.overlay.read(refit_name(digest), _CPU).clone() for digest in sorted(digests)}, partial)
        to_disk(partial)
        partial.replace(path)


def carry_refits(plan: Plan, plans: Sequence[Plan], path: Path) -> None:
    """Have the refits of ``plan``, made of ``plans``, beside the ``path`` that it gets: those that ``plans`` have in
    files beside them; or nothing to be done where ``path`` is in the directory of the model that has them. Raises
    PlanError, OutputError."""
    wanted = {
        digest: suffix[1:] if suffix.startswith("/") else f".{position}.{suffix}"
        for position, layer in enumerate(plan.layers)
        for suffix, digest in layer.refits.items()
    }
    if not wanted or _has(path.parent, wanted.values()):
        return
    found: dict[str, torch.Tensor] = {}
    for one in plans:
        if one.origin is not None and refits_file(one.origin).is_file():
            with safe_open(refits_file(one.origin), "pt") as file:
                found |= {name: file.get_tensor(name) for name in wanted.keys() & set(file.keys())}
    if wanted.keys() - found.keys():
        last = plans[-1].origin
        raise PlanError(
            "the plans have tensors that were fitted anew; write this one into the directory of the model that has them"
            + ("" if last is None else f", {last.parent}")
        )
    with disk_errors(refits_file(path)):
        make_parents(path)
        save_file(found, refits_file(path))


def _has(directory: Path, endings: Iterable[str]) -> bool:
    """Whether ``directory`` is a checkpoint with a tensor for each of these ends of names."""
    try:
        names = Checkpoint(directory).names
    except CheckpointError:
        return False
    ends = {name[place:] for name in names for place, sign in enumerate(name) if sign == "."}
    return all(ending in ends or ending in names for ending in endings)


def use_plan(job: Job, plan: Plan) -> None:
    """Raise PlanError unless ``plan`` can be used with the checkpoint of ``job``, which then finds its refits: beside
    the file of the plan, or in the checkpoint that was written with them."""
    check_plan(plan, job.checkpoint.fingerprint(), job.checkpoint, job.architecture.layout)
    embedding = job.architecture.embedding_names
    if entering := [name[1:] for name in plan.layers[-1].after if name[1:] in embedding]:
        raise PlanError(f"{entering[0]} was fitted anew, but is the embedding; only what comes after the layers can be")
    wanted = {
        digest: (position, layer.base, suffix)
        for position, layer in enumerate(plan.layers)
        for suffix, digest in layer.refits.items()
    }
    missing = [digest for digest in wanted if not job.overlay.has(refit_name(digest))]
    if not missing:
        return
    for digest, place in _places(job, plan, {digest: wanted[digest] for digest in missing}).items():
        position, base, suffix = wanted[digest]
        expected = job.source.info(job.architecture.layout.name(base, suffix))
        job.overlay.add(refit_name(digest), place)
        found = digest_of(job.overlay.read(refit_name(digest), _CPU))
        if place.info != expected or found != digest:
            job.overlay.remove(refit_name(digest))
            raise PlanError(
                f"{place.path}: layers[{position}]'s {suffix} is not what the plan says (sha256 {digest[:12]}…); the "
                "file was changed or damaged; make the plan again"
            )


def _places(job: Job, plan: Plan, wanted: Mapping[str, tuple[int, int, str]]) -> dict[str, Location]:
    """Where the tensors ``wanted`` are: by digest their position, base and suffix. Raises PlanError."""
    if plan.origin is None:
        raise PlanError("the plan has repaired layers, whose tensors are not at hand; load it from its file")
    path = refits_file(plan.origin)
    if path.is_file():
        placed = {name: Location(path, one.start, one.info) for name, one in read_header(path).tensors.items()}
        names = {digest: digest for digest in wanted}
    else:
        try:
            placed_in = Checkpoint(plan.origin.parent)
        except CheckpointError:
            raise PlanError(
                f"{plan.origin}: layers were repaired, but {path.name} is not beside it; copy it there, or give the "
                "plan of the pruned model"
            ) from None
        layout = job.architecture.layout
        names = {digest: layout.name(position, suffix) for digest, (position, _, suffix) in wanted.items()}
        placed = {name: placed_in.locate(name) for name in names.values() if name in {*placed_in.names}}
    if lost := [digest for digest, name in names.items() if name not in placed]:
        position, _, suffix = wanted[lost[0]]
        raise PlanError(
            f"{path}: layers[{position}]'s {suffix}, which was fitted anew, is not there; copy the file again"
        )
    return {digest: placed[name] for digest, name in names.items()}
