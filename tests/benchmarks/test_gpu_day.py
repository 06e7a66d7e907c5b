"""The GPU day, rehearsed on a CPU: every row comes to a figure, and what goes wrong in one leaves the others alone."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PROGRAM = [sys.executable, str(BENCHMARKS / "gpu_day.py")]
CPU = torch.device("cpu")


@dataclass
class Done:
    """What came of a part."""

    returncode: int | str | None
    stdout: str
    stderr: str


def rehearse_alone(out: Path, part: int) -> Done:
    """The program itself."""
    command = [*PROGRAM, "--part", str(part), "--rehearse", "--out", str(out), "--work", str(out / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def rehearse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """The program in this process, whose server of processes serves every test."""
    import gpu_day

    monkeypatch.setattr(gpu_day, "prepare", lambda: None)  # it would change this process

    def run(part: int, *more: str) -> Done:
        command = ["--part", str(part), "--out", str(tmp_path), "--work", str(tmp_path / "work"), *more]
        try:
            code: int | str | None = gpu_day.main(command)
        except SystemExit as end:
            code = end.code
        return Done(code, *capsys.readouterr())

    return run


def rows_of(out: Path, part: int) -> dict[str, Any]:
    document = json.loads((out / f"gpu-day-part{part}.json").read_text())
    assert document["rehearsal"]
    return {row["row"]: row for row in document["rows"]}


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_every_row_of_a_part_comes_to_a_figure(part: int, rehearse: Callable[..., Done], tmp_path: Path) -> None:
    from gpu_rows import ROWS

    done = rehearse_alone(tmp_path, part) if part == 1 else rehearse(part, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("missing packages: none\ndevice: ")
    found, table = rows_of(tmp_path, part), (tmp_path / f"gpu-day-part{part}.md").read_text()
    assert list(found) == [row.name for row in ROWS if part in row.parts]
    for name, row in found.items():
        assert row["measured"], name
        assert any(character.isdigit() for character in row["measured"]), name
        assert row["figures"], name
        assert row["verdict"] in ("met", "not judged", ""), name
        assert f"| {name} | " in table
    assert list((tmp_path / "work").iterdir()) == [], "what was made is removed"


def test_a_row_that_goes_wrong_is_a_row_and_the_others_go_on(rehearse: Callable[..., Done], tmp_path: Path) -> None:
    wrong = ("fails", "sleeps", "crashes", "misses", "waits", "waits-for-killed")
    done = rehearse(3, "--rehearse", "--only", *wrong, "rejects-70b")
    assert done.returncode == 1
    found, table = rows_of(tmp_path, 3), (tmp_path / "gpu-day-part3.md").read_text()
    verdicts = {name: row["verdict"] for name, row in found.items()}
    assert verdicts == {
        "make-70b": "",  # what rejects-70b needs
        "rejects-70b": "met",
        "fails": "FAILED",
        "sleeps": "KILLED",
        "crashes": "DIED",
        "misses": "MISSED",
        "waits": "NOT RUN",
        "waits-for-killed": "NOT RUN",
    }
    assert found["fails"]["error"].endswith("ValueError: a row made to fail")
    assert 'gpu_rows.py", line' in found["fails"]["error"]
    assert re.search(r"fails +[\d.]+ s  FAILED", done.stdout)
    assert "killed at its limit of 3 s" in table
    assert "in sleeps" in found["sleeps"]["error"], "where it was"
    assert "died of SIGSEGV" in found["crashes"]["error"]
    assert found["sleeps"]["figures"]["answer"] == 42, "what it had told before"
    assert not runs(found["sleeps"]["figures"]["child"]), "what it had started"
    assert found["waits"]["error"] == "needs fails"


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def child_of_row(work: Path) -> int | None:
    """The process that the row ``sleeps`` has started, once it has told."""
    notes = [json.loads(path.read_text()) for path in work.glob("*/rows/sleeps/notes.json")]
    return notes[0].get("child") if notes else None


def test_rows_of_several_parts_come_in_the_order_asked_for(rehearse: Callable[..., Done], tmp_path: Path) -> None:
    done = rehearse(3, "--part", "3", "4", "--rehearse", "--only", "misses", "rejects-70b", "make-7b")
    assert done.returncode == 1, "one that misses"
    document = json.loads((tmp_path / "gpu-day-part3-4.json").read_text())
    assert [row["row"] for row in document["rows"]] == ["misses", "make-70b", "rejects-70b", "make-7b"]


def test_a_part_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    number = signal.SIGTERM
    command = [*PROGRAM, "--part", "3", "--rehearse", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    with subprocess.Popen([*command, "--only", "sleeps"], stdout=subprocess.PIPE, text=True) as program:
        try:
            deadline = time.monotonic() + 60
            while (child := child_of_row(tmp_path / "work")) is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            program.send_signal(number)
            program.send_signal(number)  # a shell sends it to the group as well
            assert program.wait(30) == 128 + number
        finally:
            program.kill()
    assert list((tmp_path / "work").iterdir()) == []
    assert not runs(child)


def test_no_time_left_is_said_for_every_row(rehearse: Callable[..., Done], tmp_path: Path) -> None:
    done = rehearse(2, "--rehearse", "--limit", "0", "--only", "make-13b", "make-7b")
    assert done.returncode == 1
    assert [row["verdict"] for row in rows_of(tmp_path, 2).values()] == ["NO TIME", "NO TIME"]
    assert "no time is left for it: 0 s" in done.stdout


def test_missing_packages_are_named_first(
    rehearse: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gpu_day

    monkeypatch.setattr(gpu_day, "NEEDED", (*gpu_day.NEEDED, "a_package_that_is_not_there"))
    done = rehearse(3, "--rehearse", "--only", "make-70b")
    assert done.stdout.splitlines()[0] == "missing packages: a_package_that_is_not_there"
    assert "missing packages: a_package_that_is_not_there" in (tmp_path / "gpu-day-part3.md").read_text()
    assert done.returncode == 0, "what can be measured is"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(rehearse: Callable[..., Done]) -> None:
    done = rehearse(3)
    assert done.returncode == 1
    assert "no CUDA device" in done.stdout
    assert "--rehearse" in done.stdout.splitlines()[-1]


def test_a_name_that_is_no_row_is_a_usage_error(rehearse: Callable[..., Done]) -> None:
    done = rehearse(2, "--rehearse", "--only", "laco-7b")
    assert done.returncode == 2
    assert "'laco-7b' is no row of part 2, which has make-7b, " in done.stderr


def test_the_parent_imports_nothing_that_could_touch_a_device() -> None:
    code = "import sys, gpu_day; assert not {'torch', 'transformers', 'numpy', 'psutil'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=BENCHMARKS)


def test_every_row_names_a_function_that_takes_what_it_is_given() -> None:
    from gpu_rows import ABOUT, ROWS

    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in (ABOUT, *ROWS):
        module, name = row.call.split(":")
        inspect.signature(getattr(import_module(module), name)).bind(None, **row.given)


def test_a_row_comes_after_those_that_it_needs() -> None:
    from gpu_rows import PARTS, ROWS

    for part in PARTS:
        before: set[str] = set()
        for row in ROWS:
            if part in row.parts:
                assert set(row.needs) <= before, row.name
                before.add(row.name)


def test_rows_can_be_run_without_a_server(tmp_path: Path) -> None:
    from gpu_rows import ROWS
    from gpu_runner import Runner

    row = next(row for row in ROWS if row.name == "make-70b")
    outcome = Runner(tmp_path, True, time.monotonic() + 60, "spawn").run(row)
    assert outcome.ended == "measured", outcome.error
    assert (tmp_path / "llama2-70b" / "config.json").is_file()


@pytest.mark.parametrize(
    ("holds", "fast", "rehearsed", "real"),
    [
        (None, None, "", ""),
        (True, None, "met", "met"),
        (False, True, "MISSED", "MISSED"),
        (True, False, "met", "MISSED"),
        (None, False, "not judged", "MISSED"),
        (None, True, "not judged", "met"),
    ],
)
def test_a_rehearsal_does_not_judge_speed(
    holds: bool | None, fast: bool | None, rehearsed: str, real: str, tmp_path: Path
) -> None:
    from gpu_results import Results
    from gpu_rows import ROWS, Finding
    from gpu_runner import Outcome

    outcome = Outcome(ROWS[0], "measured", 1.0, Finding("1", {}, holds, fast))
    for rehearsal, verdict in ((True, rehearsed), (False, real)):
        results = Results(tmp_path, "1", rehearsal)
        results.add(outcome)
        assert results.verdict(outcome) == verdict
        assert results.good() is (verdict != "MISSED")


def test_peaks_are_beyond_what_was_held_before() -> None:
    from gpu_runs import peaks, within_limits

    from streamcollapse.resources.meter import MemorySample

    usage = {"peak_vram_reserved": 500, "peak_vram_device": 900, "peak_rss": 70}
    found = peaks(usage, MemorySample(rss=50, vram_device=300))
    assert found == {"allocator": 500, "device": 600, "process": 20}
    assert within_limits(found, 500, 20)
    assert not within_limits(found, 499, 20)
    assert not within_limits(found, 500, 19)
    on_cpu = peaks({**usage, "peak_vram_reserved": None, "peak_vram_device": None}, MemorySample(rss=50))
    assert on_cpu == {"allocator": None, "device": None, "process": 20}
    assert within_limits(on_cpu, 1, None)


def test_the_stand_in_brings_what_is_stored_with_any_number_of_requests(tmp_path: Path) -> None:
    from gpu_bus import Layers, requests, stream_of
    from gpu_devices import HostDevice
    from make_checkpoint import SHAPES, make_checkpoint

    from streamcollapse.run.opened import open_job
    from streamcollapse.settings.run import Compute, RunSettings
    from streamcollapse.stream import loaders

    make_checkpoint(tmp_path / "tiny", SHAPES["tiny"], device=CPU)
    layers = Layers.of(open_job(tmp_path / "tiny", RunSettings(Compute("cpu"))))
    for count in (1, 8):
        with requests(count), stream_of(layers, HostDevice()) as stream, stream.run(layers.names) as weights:
            assert isinstance(stream.loader, loaders.DeviceLoader)
            assert stream.loader._reader._pool._max_workers == count
            for names in layers.names:
                with weights.step():
                    assert all(torch.equal(weights.read(n, CPU), layers.job.checkpoint.read(n, CPU)) for n in names)
    stored = sum(layers.job.checkpoint.info(name).num_bytes for names in layers.names for name in names)
    assert layers.num_bytes == stored


def test_a_test_that_fails_is_told_with_the_end_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_checks
    from gpu_bench import Bench

    (tmp_path / "tests").mkdir()
    tests = [f"import pytest\n\n\n@{gpu_checks.MARK}\ndef test_it():\n    assert 1 == {n}\n" for n in (1, 2)]
    for number, text in enumerate(tests):
        (tmp_path / "tests" / f"test_{number}.py").write_text(text)
    (tmp_path / "tests" / "test_other.py").write_text("raise AssertionError")
    monkeypatch.setattr(gpu_checks, "ROOT", tmp_path)
    finding = gpu_checks.tests(Bench(tmp_path, tmp_path, False))
    assert finding.measured == "1 passed, 1 failed, 0 skipped, in 2 files"
    assert finding.holds is False
    assert "assert 1 == 2" in finding.output
    (tmp_path / "tests" / "test_1.py").unlink()
    assert gpu_checks.tests(Bench(tmp_path, tmp_path, False)).holds


def test_searches_are_compared_decision_by_decision(tmp_path: Path) -> None:
    from gpu_runs import compared, searched
    from make_checkpoint import SHAPES, make_checkpoint

    from streamcollapse.settings.run import Calibration, Compute, RunSettings
    from streamcollapse.settings.search import SearchOptions

    make_checkpoint(tmp_path / "tiny", SHAPES["tiny"], device=CPU)
    (tmp_path / "text.txt").write_text("one sentence of a few words")

    def plan(**settings: Any) -> Any:
        run = RunSettings(Compute("cpu", "float32"), Calibration(tmp_path / "text.txt"))
        found = searched(tmp_path / "tiny", SearchOptions(strategy="laco", **settings), run)
        assert [phase["name"] for phase in found.usage["phases"]] == ["reference", "search"]
        assert found.usage["memory"]["budgets"]["ram"] > 0
        return found.plan

    one = plan(threshold=-1)
    assert (compared(one, plan(threshold=-1)).same, compared(one, plan(threshold=-1)).apart) == (True, 0.0)
    assert "similarities of 2 decisions equal" in compared(one, one).words
    other = compared(one, plan(threshold=1))
    assert (other.same, other.apart) == (False, None)
    assert other.words.startswith("other layers (2, and 8)")
    mean = compared(one, plan(threshold=-1, rule="mean"))
    assert not mean.same
    assert mean.apart is not None
    assert mean.apart > 0
