"""Writing to a disk that may be full: errors in one line, space asked for beforehand, small files whole or not at
all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamcollapse.errors import OutputError
from streamcollapse.units import format_bytes


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns an OSError inside it into an OutputError that names ``path`` and, on a full disk, what is left."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(no_space(path.parent, needed)) from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def no_space(directory: Path, needed: int | None) -> str:
    """The one line for a disk that is too full for ``needed`` bytes in ``directory``."""
    free = format_bytes(shutil.disk_usage(directory).free)
    need = "" if needed is None else f"{format_bytes(needed)} needed, "
    return f"{directory}: no space on the disk: {need}{free} free; free some or choose another place"


def check_space(out: Path, needed: int) -> int:
    """The bytes that are free in the file system that will hold ``out``. Raises OutputError if they are less than
    ``needed``."""
    parent = out.resolve().parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(no_space(parent, needed))
    return free


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all. Raises OutputError."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
