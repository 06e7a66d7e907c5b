"""Signals end a run in order, wherever it is, and what it had found out is taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamcollapse import resume
from streamcollapse.cli import signals
from tests.checkpoints import save_llama

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are those of a Unix")

# The real program, which sends itself a signal at the third event of a phase.
SIGNALLED = """
import contextlib, os, sys
from streamcollapse.cli.verbs import apply, convert, prune, resume, search
from streamcollapse.__main__ import main
from streamcollapse.progress import PhaseStarted
phase, number, times = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
seen = []
def listen(event):
    seen.append(event.name if isinstance(event, PhaseStarted) else (seen or [""])[-1])
    if seen[-1] == phase and seen.count(phase) == 3:
        for _ in range(times):
            os.kill(os.getpid(), number)
@contextlib.contextmanager
def live_progress(quiet, verbose=False):
    yield listen
for verb in (apply, convert, prune, resume, search):
    verb.live_progress = live_progress
main()
"""
SEARCH = ["-C", "3", "-I", "1", "-T", "0.5", "--rule", "mean", "--compute-dtype", "float32"]


def signalled(phase: str, number: int, *arguments: str, times: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SIGNALLED, phase, str(int(number)), str(times), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "source", num_layers=6)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("reference", signal.SIGINT),
        ("search", signal.SIGINT),
        ("search", signal.SIGTERM),
        ("write", signal.SIGHUP),
        ("convert", signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_run_that_can_be_resumed(tmp_path: Path, source: Path, phase: str, number: int) -> None:
    verb = ["convert", "--dtype", "bfloat16"] if phase == "convert" else ["prune", *SEARCH]
    arguments = [*verb, str(source), "--out", str(tmp_path / "out"), "--max-shard-size", "4kB"]
    done = signalled(phase, number, *arguments)
    assert (done.returncode, done.stdout) == (128 + number, "")
    (said,) = done.stderr.splitlines()
    work = tmp_path / ".out.work"
    if phase == "reference":  # nothing was found out yet
        assert said == "interrupted: the run was not finished; the same command starts it again"
        assert [p.name for p in tmp_path.iterdir() if p != source and not p.name.endswith(".lock")] == []
        return
    assert said == f"interrupted: progress saved; resume with: streamcollapse resume {work}"
    assert not (tmp_path / "out").exists()
    resume(work)
    assert (tmp_path / "out" / "config.json").exists()
    assert not work.exists()


def test_a_signal_that_comes_twice_is_one_wish(tmp_path: Path, source: Path) -> None:
    done = signalled("search", signal.SIGTERM, "prune", *SEARCH, str(source), "--out", str(tmp_path / "out"), times=5)
    assert done.returncode == 143
    assert "streamcollapse resume" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_signal_before_anything_has_begun_is_one_line_too() -> None:
    code = "import os, streamcollapse.__main__ as m; m.end_at_once(); os.kill(os.getpid(), 2); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted: nothing had begun\n")


def test_a_signal_that_is_to_be_ignored_is_ignored(tmp_path: Path, source: Path) -> None:
    """As under nohup, whose terminal is closed."""
    command = [sys.executable, "-c", SIGNALLED, "search", str(int(signal.SIGHUP)), "1", "prune", *SEARCH, str(source)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert done.returncode == 0
    assert (tmp_path / "out").exists()


def test_a_later_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    moments, left = iter([10.0, 11.0, 12.5]), []
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(moments))
    monkeypatch.setattr(signals.os, "_exit", left.append)
    ending = signals._Ending()
    with pytest.raises(signals.EndedError):
        ending(signal.SIGTERM, None)
    ending(signal.SIGTERM, None)
    assert left == []
    ending(signal.SIGTERM, None)
    assert left == [143]
    assert capfd.readouterr().err.startswith("interrupted: at once")
