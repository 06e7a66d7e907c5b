"""Runs a program and measures it from outside: wall-clock seconds and the peak memory of its whole process tree.

Memory is what /proc/PID/status says, summed over the tree and sampled every 10 ms: all resident pages, and anonymous
ones, which leave out file pages that the kernel can drop at any time. Elsewhere than on Linux: resident memory alone.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 0.01
CHUNK_BYTES = 1 << 24


class FailedError(Exception):
    """A program that did not finish, with the end of what it said."""


@dataclass(frozen=True)
class Measured:
    """One run; ``document`` is the JSON of its last line."""

    seconds: float
    peak_rss: int
    peak_anonymous_rss: int | None
    document: dict[str, Any]


def run(command: list[str], environment: dict[str, str]) -> Measured:
    """Run ``command`` to its end. Raises FailedError, with the reason in one line."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        peak_rss, peak_anonymous = 0, 0
        try:
            while process.poll() is None:
                rss, anonymous = tree_memory(process.pid)
                peak_rss, peak_anonymous = max(peak_rss, rss), max(peak_anonymous, anonymous)
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        lines = out.read().decode(errors="replace").splitlines()
        said = [line.strip() for line in err.read().decode(errors="replace").splitlines() if line.strip()]
    if process.returncode != 0 or not lines:
        raise FailedError(f"exit status {process.returncode}: {' | '.join(said[-3:]) or 'no output'}")
    return Measured(seconds, peak_rss, peak_anonymous or None, json.loads(lines[-1]))


def tree_memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes (0 where the system does not tell) of process ``pid`` and all below it."""
    if not Path("/proc/self/status").exists():
        try:
            return int(psutil.Process(pid).memory_info().rss), 0
        except psutil.Error:
            return 0, 0
    rss, anonymous, left = 0, 0, [pid]
    while left:
        process = Path("/proc") / str(left.pop())
        try:
            fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            children = [path.read_text() for path in process.glob("task/*/children")]
        except OSError:  # it has ended
            continue
        rss += _bytes(fields.get("VmRSS"))
        anonymous += _bytes(fields.get("RssAnon"))
        left += [int(child) for text in children for child in text.split()]
    return rss, anonymous


def _bytes(field: str | None) -> int:
    return int(field.split()[0]) * 1024 if field else 0


def warm(directory: Path) -> None:
    """Read every file of ``directory``, so that it is in the page cache where memory allows."""
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK_BYTES):
                pass


def chill(directory: Path) -> None:
    """Ask the system to drop every file of ``directory`` from the page cache."""
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("--cold needs a system with posix_fadvise, such as Linux")
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def heat(num_bytes: int) -> None:
    """Use ``num_bytes`` of memory, or what is free, and let go of it.

    A virtual machine may give memory that has been free for a while back to its host, and whoever touches it next then
    waits for the host to bring it again.
    """
    size = min(num_bytes, int(psutil.virtual_memory().available * 0.8)) // mmap.PAGESIZE * mmap.PAGESIZE
    with mmap.mmap(-1, size) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # large blocks are what is given back
        for start in range(0, size, mmap.PAGESIZE):
            memory[start] = 1


def copy_seconds(directory: Path, num_bytes: int, target: Path) -> float:
    """Seconds to copy the first ``num_bytes`` of the shards in ``directory`` to ``target``, down to the disk."""
    left = num_bytes
    start = time.perf_counter()
    with target.open("wb") as written:
        for path in sorted(directory.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                    written.write(chunk)
                    left -= len(chunk)
        written.flush()
        os.fsync(written.fileno())
    return time.perf_counter() - start


def write_sentences(path: Path, count: int) -> None:
    """Write the first ``count`` of the sentences that ship with the package to ``path``, one a line."""
    text = (resources.files("streamcollapse.data") / "sentences.txt").read_text(encoding="utf-8")
    path.write_text("".join(line + "\n" for line in text.splitlines()[:count]), encoding="utf-8")
