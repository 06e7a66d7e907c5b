"""Writing to a disk that may be full: errors in one line, space asked for beforehand, small files whole or not at all,
records one by one, digests on the side."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    parent = next(parent for parent in out.resolve().parents if parent.is_dir())  # the others are made in time
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(no_space(parent, needed))
    return free


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all, and on the disk before it has its name. Raises OutputError."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        to_disk(partial)
        partial.replace(path)


def to_disk(path: Path) -> None:
    """Return when the contents of the file or directory ``path`` are on the disk. Raises OSError."""
    if os.name == "nt" and path.is_dir():  # directories cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Digest:
    """sha256 of what is passed to ``update``, computed on a thread of its own: the disk does not wait for it."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def update(self, data: memoryview) -> Future[None]:
        """Add ``data``, which must not change before the future is done."""
        return self._thread.submit(self._hash.update, data)

    def close(self) -> str:
        """The digest in hexadecimal, once everything is in it."""
        self._thread.shutdown(wait=True)
        return self._hash.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of the file ``path``, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, sha256: str) -> bool:
    """Whether the file ``path`` is there and has the digest ``sha256``."""
    try:
        return file_digest(path) == sha256
    except OSError:
        return False


class Journal:
    """The records of the file ``path``, which need not exist yet. Raises OutputError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = []
        if not path.exists():
            return
        with disk_errors(path):
            text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n")[:-1]:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # what cannot be read is found out again
            if isinstance(record, dict):
                self.records.append(record)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add ``records``. Raises OutputError where the disk is full."""
        if not records:
            return
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with disk_errors(self._path, needed=len(lines)), self._path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                lines = lines if file.read(1) == b"\n" else "\n" + lines
            try:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # half a record would only be noise
                raise
        self.records += [dict(record) for record in records]
