"""sha256 of files, while they are written and afterwards."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


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
