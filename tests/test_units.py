from __future__ import annotations

import pickle

import pytest

from streamcollapse.batches.worker import Outcome
from streamcollapse.cli.screen import live_progress
from streamcollapse.cli.text import said
from streamcollapse.cli.verbs.batch import _line
from streamcollapse.errors import CheckpointError, OptionError, printable
from streamcollapse.progress import WarningRaised
from streamcollapse.units import format_about, format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("7", 7), (7, 7), ("300kb", 300_000), (" 2 MiB ", 2**21)],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "5 XB", "-1GB", "GB", "0", "0.1", "1e9", "5 GB extra", "9e9", "9" * 400, "8388608TiB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (22_038_912, "22 MB"), (999_600, "1 MB"), (13.5e9, "13.5 GB")]
)
def test_sizes_are_written(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.424, "0.42 s"), (12.34, "12.3 s"), (59.97, "60.0 s"), (245, "4 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations_are_written(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_terminal_control_sequences_are_escaped() -> None:
    assert printable("a\x1b[31mb\nc") == "a\\x1b[31mb\\nc"
    assert printable("Ångström €") == "Ångström €"


def test_an_error_escapes_its_text_once_whoever_raises_it() -> None:
    error = CheckpointError("a\x1b[2J\nb: tensor \u202ex")
    assert str(error) == "a\\x1b[2J\\nb: tensor \\u202ex"
    assert str(CheckpointError(str(error))) == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # from a worker's process


def test_the_command_line_names_its_options_where_the_library_names_settings() -> None:
    assert (
        said("in use; choose another `work_dir` or pass `io=mmap`")
        == "in use; choose another --work-dir or pass --io mmap"
    )
    assert said("raise `highest`, or pass `overwrite`; \x1b") == "raise --highest, or pass --overwrite; \\x1b"
    assert said("`rope_scaling` is missing `factor=2`") == "`rope_scaling` is missing `factor=2`"


def test_warnings_and_failed_jobs_name_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    with live_progress(quiet=True) as listener:
        listener(WarningRaised("raise `highest`; \x1b"))
    assert capsys.readouterr().err == "warning: raise --highest; \\x1b\n"
    failed = Outcome("job", "failed", "there", "exists; choose another `out`")
    assert _line(failed).plain == "failed job  exists; choose another --out"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3.0, "a few seconds"),
        (22.0, "about 20 seconds"),
        (58.0, "about 1 minute"),
        (150.0, "about 2 minutes"),
        (3.4 * 3600, "about 3.5 hours"),
        (4 * 86400, "about 4 days"),
    ],
)
def test_estimates_in_words(seconds: float, words: str) -> None:
    assert format_about(seconds) == words
