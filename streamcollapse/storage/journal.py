"""An append-only file of records, one JSON object a line, each on the disk before the call returns.

A process that is killed leaves at most a torn last line, which is dropped when the file is read again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamcollapse.storage.disk import disk_errors


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
