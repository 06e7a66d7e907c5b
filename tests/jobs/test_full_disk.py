"""A disk that is full at the wrong moment: one line with what is needed and what is there, and on once there is
room."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamcollapse import Compute, Output, SearchOptions, prune, resume
from streamcollapse.errors import OutputError
from streamcollapse.progress import DecisionMade, Event, PhaseStarted, StepDone
from streamcollapse.settings.run import RunSettings, Streaming
from tests.checkpoints import save_llama

OPTIONS = SearchOptions(layers_per_merge=3, interval=1, threshold=0.6, rule="mean")
FLOAT32 = Compute("cpu", "float32")
OUTPUT = Output("300kB")
NEEDED_AND_FREE = r"no space on the disk: [\d.]+ \w+ needed, [\d.]+ \w+ free; free some"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], check=False)
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "source", num_layers=8)


def fill(disk: Path, leave: int) -> None:
    """Leave about ``leave`` bytes free."""
    about = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(about.f_bavail * about.f_frsize - leave, 1))


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "streamcollapse_report.json"}


def test_a_disk_that_is_too_small_from_the_start(source: Path, small_disk: Path) -> None:
    fill(small_disk, 100_000)
    with pytest.raises(OutputError, match=NEEDED_AND_FREE):
        prune(source, small_disk / "out", OPTIONS, settings=RunSettings(compute=FLOAT32, output=OUTPUT))
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("phase", ["reference", "search", "write"])
def test_a_disk_that_fills_up_under_the_run(source: Path, small_disk: Path, tmp_path: Path, phase: str) -> None:
    prune(source, tmp_path / "expected", OPTIONS, settings=RunSettings(compute=FLOAT32, output=OUTPUT))
    out = small_disk / "out"

    def meddle(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == phase:
            fill(small_disk, 0)

    with pytest.raises(OutputError, match=NEEDED_AND_FREE) as raised:
        prune(source, out, OPTIONS, settings=RunSettings(compute=FLOAT32, output=OUTPUT), listener=meddle)
    assert "\n" not in str(raised.value)
    assert not out.exists()
    (small_disk / "filler").unlink()
    if phase == "reference":  # nothing was found out: nothing to go on with
        assert not list(small_disk.iterdir())
        prune(source, out, OPTIONS, settings=RunSettings(compute=FLOAT32, output=OUTPUT))
    else:
        assert f"resume with: streamcollapse resume {small_disk / '.out.work'}" in str(raised.value)
        resume(small_disk / ".out.work")
    assert files(out) == files(tmp_path / "expected")
    assert [p.name for p in small_disk.iterdir()] == ["out"]


def test_what_is_reserved_already_does_not_count_twice(source: Path, small_disk: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "expected", OPTIONS, settings=RunSettings(compute=FLOAT32, output=OUTPUT))
    out = small_disk / "out"

    def meddle(event: Event) -> None:
        if isinstance(event, StepDone) and not (small_disk / "filler").exists():
            fill(small_disk, 0)

    with pytest.raises(OutputError, match="no space on the disk"):
        prune(source, out, OPTIONS, settings=RunSettings(compute=FLOAT32, output=OUTPUT), listener=meddle)
    assert sum(p.stat().st_size for p in (small_disk / ".out.partial").iterdir()) > 800_000
    (small_disk / "filler").unlink()
    fill(small_disk, 200_000)
    resume(small_disk / ".out.work")
    assert files(out) == files(tmp_path / "expected")


def test_a_journal_that_cannot_grow(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the third record: a seam, since a file system has room for a few bytes more."""
    expected = prune(source, tmp_path / "expected", OPTIONS, settings=RunSettings(compute=FLOAT32, output=OUTPUT))
    original, decided = os.fsync, []

    def full(handle: int) -> None:
        if decided and Path(f"/proc/self/fd/{handle}").readlink().name == "journal.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    def listen(event: Event) -> None:
        if isinstance(event, DecisionMade):
            decided.append(event)

    monkeypatch.setattr(os, "fsync", full)
    one_each = Streaming(lookahead=1)
    with pytest.raises(OutputError, match=rf"{NEEDED_AND_FREE}.*streamcollapse resume"):
        prune(
            source,
            tmp_path / "out",
            OPTIONS,
            settings=RunSettings(compute=FLOAT32, output=OUTPUT, streaming=one_each),
            listener=listen,
        )
    assert len(decided) == 1
    decided.clear()
    assert resume(tmp_path / ".out.work").plan == expected.plan
    assert files(tmp_path / "out") == files(tmp_path / "expected")
