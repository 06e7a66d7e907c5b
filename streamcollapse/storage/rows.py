"""Single rows of a matrix in a file, such as those of an embedding that a text needs."""

from __future__ import annotations

from itertools import pairwise

import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.extents import Location
from streamcollapse.storage.mapping import changed_size
from streamcollapse.storage.reader import read_into


def read_rows(place: Location, rows: torch.Tensor) -> torch.Tensor:
    """Rows ``rows`` (int64, any shape) of the matrix at ``place``, each read once; neighbours together.

    Returns shape (*rows.shape, *the matrix's shape without its first dimension). Raises CheckpointError where the file
    cannot be read or ends too early.
    """
    if place.strides is not None:
        return _whole(place)[rows.cpu()]
    wanted, where = torch.unique(rows.cpu(), return_inverse=True)
    shape = place.info.shape[1:]
    row_bytes = place.info.num_bytes // max(place.info.shape[0], 1)
    read = torch.empty(len(wanted), row_bytes, dtype=torch.uint8)
    starts = [i for i in range(len(wanted)) if i == 0 or wanted[i] != wanted[i - 1] + 1]
    try:
        with place.path.open("rb", buffering=0) as file:
            for first, end in pairwise([*starts, len(wanted)]):
                _fill(file.fileno(), read[first:end], place, int(wanted[first]) * row_bytes)
    except OSError as error:
        raise CheckpointError(f"{place.path}: cannot be read: {error.strerror or error}") from error
    return read.view(-1).view(place.info.dtype).view(len(wanted), *shape)[where]


def _whole(place: Location) -> torch.Tensor:
    """The matrix, whose rows do not lie one after the other (a transposed one, in a PyTorch file)."""
    read = torch.empty(place.end - place.start, dtype=torch.uint8)
    try:
        with place.path.open("rb", buffering=0) as file:
            _fill(file.fileno(), read, place, 0)
    except OSError as error:
        raise CheckpointError(f"{place.path}: cannot be read: {error.strerror or error}") from error
    return place.shaped(read.view(place.info.dtype))


def _fill(handle: int, target: torch.Tensor, place: Location, offset: int) -> None:
    """``target`` from ``offset`` within the tensor on."""
    view, done = target.view(-1).numpy().data, 0
    while done < len(view):
        count = read_into(handle, view[done:], place.start + offset + done)
        if count <= 0:
            raise changed_size(place.path)
        done += count
