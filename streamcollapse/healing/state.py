"""What healing keeps between two steps, in a work directory: masters, moments, the best so far; and hidden states that
are made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from streamcollapse.errors import OutputError
from streamcollapse.healing.learn import Progress, State
from streamcollapse.run.work_directory import HEALING, TemporaryWork, read_document, write_document
from streamcollapse.storage.disk import disk_errors, to_disk
from streamcollapse.storage.scratch import Scratch

_NUMBERS = ("step", "losses", "judged", "best_step", "stopped")


def save_progress(work: TemporaryWork, identity: str, progress: Progress, masters: State) -> None:
    """Keep the state after a step of the healing ``identity``, whole or as it was before. Raises OutputError."""
    tensors = {f"master/{name}": tensor for name, tensor in masters.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in progress.best.items()}
    tensors |= {f"moment/{name}": tensor for name, tensor in progress.moments.items()}
    numbers = json.dumps({name: getattr(progress, name) for name in _NUMBERS})
    path = work.path / HEALING
    partial = path.with_name(f".{HEALING}.partial")
    with disk_errors(path, needed=sum(tensor.nbytes for tensor in tensors.values())):
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            partial,
            {"progress": numbers, "of": identity},
        )
        to_disk(partial)
        partial.replace(path)


def load_progress(work: TemporaryWork, identity: str) -> tuple[Progress, State]:
    """The state that was kept of the healing ``identity``, and the masters; of one that is new, the beginning and
    nothing. Raises OutputError."""
    path = work.path / HEALING
    if not path.is_file():
        return Progress(), {}
    try:
        with safe_open(path, "pt") as file:
            if file.metadata()["of"] != identity:
                return Progress(), {}
            numbers = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: is not whole ({error}); remove {work.path} to begin again") from error
    numbers["judged"] = {int(step): loss for step, loss in numbers["judged"].items()}

    def kind(which: str) -> State:
        return {name.removeprefix(which): t for name, t in tensors.items() if name.startswith(which)}

    return Progress(**numbers, best=kind("best/"), moments=kind("moment/")), kind("master/")


def kept_states(
    work: TemporaryWork, name: str, identity: str, make: Callable[[tuple[Scratch, str]], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """The hidden states ``name`` of the ``identity``: of an earlier run, or made now and kept. ``make`` is given where:
    a scratch, and their names there before their numbers. Raises NonFiniteError, OutputError."""
    path = work.path / f"{name}.json"
    if path.is_file() and (known := read_document(path)).get("of") == identity:
        return [_found(work, f"{name}-{n}", entry) for n, entry in enumerate(known["states"])]
    states = make((work.files, name))
    with disk_errors(work.path):
        for number in range(len(states)):
            to_disk(work.path / f"{name}-{number}")
    described = [{"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")} for s in states]
    write_document(path, {"of": identity, "states": described})
    return states


def _found(work: TemporaryWork, file: str, entry: dict[str, Any]) -> torch.Tensor:
    return work.files.find(file, tuple(entry["shape"]), getattr(torch, entry["dtype"]))
