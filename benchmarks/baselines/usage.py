"""What a baseline used: seconds and peak memory of this process, printed as one JSON line. Standard library only.

Memory is sampled from /proc/self/status every 10 ms; anonymous memory leaves out file pages, which the kernel can drop
at any time. Elsewhere than on Linux only the peak of all resident memory is known.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")


class Usage:
    """Samples memory from construction on; ``part`` times the parts; ``report`` prints the line."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.disk_bytes: dict[str, int] = {}
        self.pass_seconds: list[float] = []
        self._anonymous = 0
        self._stop = threading.Event()
        self._start = time.perf_counter()
        if _STATUS.exists():
            threading.Thread(target=self._sample, daemon=True).start()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body as part ``name``, and count what it reads from the disk rather than from the page cache."""
        start, read = time.perf_counter(), _disk_bytes()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.disk_bytes[name] = _disk_bytes() - read

    def passes(self, number: int, run: Callable[[], Result], cold: Path | None) -> Result:
        """Call ``run`` ``number`` times, and drop what is below ``cold`` from the page cache before each; the first
        is part ``pass``."""
        for _ in range(number):
            if cold is not None:
                chill(cold)
            with self.part("pass"):
                result = run()
            self.pass_seconds.append(self.seconds["pass"])
        self.seconds["pass"] = self.pass_seconds[0]
        return result

    def report(self, packages: tuple[str, ...], **facts: object) -> None:
        """Print the JSON line: what was done, seconds of each part, peaks in bytes, versions."""
        versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
        document = {
            **facts,
            "seconds": time.perf_counter() - self._start,
            "parts": self.seconds,
            "passes": self.pass_seconds,
            "disk_bytes_read": self.disk_bytes,
            "peak_rss": _peak_rss(),
            "peak_anonymous_rss": self._anonymous or None,
            "versions": versions,
        }
        self._stop.set()
        print(json.dumps(document), flush=True)

    def _sample(self) -> None:
        while True:
            self._anonymous = max(self._anonymous, _status("RssAnon"))
            if self._stop.wait(0.01):
                return


def _disk_bytes() -> int:
    if not _IO.exists():
        return 0
    return int(dict(line.split(": ") for line in _IO.read_text(encoding="ascii").splitlines())["read_bytes"])


def _status(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _peak_rss() -> int | None:
    if _STATUS.exists():
        return _status("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def chill(directory: Path) -> None:
    """Ask the system to drop every file below ``directory`` from the page cache."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def samples(path: Path) -> list[str]:
    """The calibration samples of ``path``, one a line."""
    return [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
