"""The sampler: whole process trees, and reasons of programs that fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HOLDS_MEMORY = "import time; held = bytearray(b'x' * 80_000_000); time.sleep(0.5)"


def test_memory_of_the_whole_tree_counts():
    from measure import run

    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS_MEMORY!r}]); print('{{\"a\": 1}}')"
    measured = run([sys.executable, "-c", child], dict(os.environ))
    assert measured.document == {"a": 1}
    assert measured.seconds > 0.5
    if Path("/proc/self/status").exists():
        assert measured.peak_anonymous_rss > 80_000_000
        assert measured.peak_rss > measured.peak_anonymous_rss


def test_a_program_that_fails_gives_its_reason():
    from measure import FailedError, run

    with pytest.raises(FailedError, match=r"exit status 3: no way"):
        run([sys.executable, "-c", "import sys; print('no way', file=sys.stderr); sys.exit(3)"], dict(os.environ))
    with pytest.raises(FailedError, match=r"exit status 0: no output"):
        run([sys.executable, "-c", ""], dict(os.environ))


def test_calibration_is_the_first_of_the_shipped_sentences(tmp_path):
    from measure import write_sentences

    write_sentences(tmp_path / "ten.txt", 10)
    write_sentences(tmp_path / "two.txt", 2)
    ten = (tmp_path / "ten.txt").read_text(encoding="utf-8").splitlines()
    assert len(ten) == 10
    assert all(ten)
    assert (tmp_path / "two.txt").read_text(encoding="utf-8").splitlines() == ten[:2]
