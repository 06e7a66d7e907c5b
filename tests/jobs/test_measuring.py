"""bench and speed: what they say is what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from streamcollapse import Compute, SearchOptions
from streamcollapse.cli.main import app
from streamcollapse.cli.plots import sparkline
from streamcollapse.errors import BudgetError, OptionError, OutputError
from streamcollapse.jobs import bench as benches
from streamcollapse.jobs import prune as prunes
from streamcollapse.jobs import speed as speeds
from streamcollapse.jobs.bench import bench
from streamcollapse.jobs.speed import speed
from streamcollapse.settings.run import BenchConditions, RunSettings
from tests.checkpoints import save_llama

CPU = Compute("cpu", "float32")


def _invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def test_bench_runs_the_real_job_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = bench(llama, conditions=BenchConditions(scratch, True), settings=RunSettings(compute=CPU))
    assert list(scratch.iterdir()) == []
    phases = {phase["name"]: phase for phase in found.report["usage"]["phases"]}
    assert list(phases) == ["reference", "search", "write", "verdict"]
    stored = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    assert 0.2 * stored < phases["reference"]["bytes_read"] < stored
    assert phases["write"]["bytes_written"] == found.report["bytes"]["after"]
    assert all(phase["peak_rss"] > 10_000_000 for phase in phases.values())
    assert all(later[0] >= earlier[0] for earlier, later in zip(found.timeline, found.timeline[1:], strict=False))
    assert max(sample.rss for _, sample in found.timeline) <= found.report["usage"]["peak_rss"]
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["format"] == "streamcollapse.bench/1"
    assert document["copy_rate"] is None, "no device"
    with pytest.raises(OutputError, match="nowhere: is not a directory; choose another `scratch`"):
        bench(llama, conditions=BenchConditions(tmp_path / "nowhere"), settings=RunSettings(compute=CPU))


def test_the_disk_is_probed_after_the_checkpoint_left_the_page_cache(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the page cache cannot be read cold, and what the probe left there would make the job warm."""
    order: list[str] = []
    monkeypatch.setattr(benches, "forget", lambda checkpoint: order.append("forget"))
    monkeypatch.setattr(benches, "read_rate", lambda checkpoint, mode, size: order.append(mode))
    bench(llama, SearchOptions(3), conditions=BenchConditions(tmp_path, True), settings=RunSettings(compute=CPU))
    assert order == ["forget", "mmap", "pread", "direct", "forget"]
    order.clear()
    bench(llama, SearchOptions(3), conditions=BenchConditions(tmp_path), settings=RunSettings(compute=CPU))
    assert order == ["mmap", "pread", "direct"]


def test_a_bench_that_fails_does_not_speak_of_going_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OutputError("no space on the disk")

    monkeypatch.setattr(prunes, "write_pruned", full)
    with pytest.raises(OutputError, match=r"^no space on the disk$"):
        bench(llama, SearchOptions(3), conditions=BenchConditions(tmp_path), settings=RunSettings(compute=CPU))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="progress saved; resume with"):
        prunes.prune(llama, tmp_path / "out", SearchOptions(3), settings=RunSettings(CPU))


def test_bench_on_the_command_line(llama: Path, tmp_path: Path) -> None:
    run = ["bench", str(llama), "--device", "cpu", "--scratch", str(tmp_path)]
    text = _invoke(*run).stdout
    for words in ("waiting for weights", "peak resident", "cold reads here", "resident memory", "8 -> "):
        assert words in text
    assert max(len(line) for line in text.splitlines()) < 120
    assert json.loads(_invoke(*run, "--json").stdout)["report"]["layers"]["before"] == 8


def test_a_picture_of_memory(llama: Path, tmp_path: Path) -> None:
    run = ["bench", str(llama), "--device", "cpu", "--scratch", str(tmp_path), "--plot"]
    refused = CliRunner().invoke(app, [*run, str(tmp_path / "memory.doc")])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert refused.exit_code == 1
        assert "pip install 'streamcollapse[plot]'" in refused.output
        pytest.skip("matplotlib is not installed")
    assert refused.exit_code == 1
    assert "a picture is .png, .svg or .pdf" in refused.output
    _invoke(*run, str(tmp_path / "memory.png"))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_of_blocks() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, 8.0), (3.9, 4.0)]
    assert sparkline(points, 4) == "▁▂█▄"
    assert sparkline(points, 8) == "▁▁▂▂███▄"
    assert sparkline(points, 4, unicode=False) == ".:@="
    assert sparkline([], 4) == ""
    assert sparkline([(0.0, 0.0)], 3) == "   "


def test_speed_of_a_checkpoint(llama: Path) -> None:
    found = speed(llama, new_tokens=4, repeat=3, settings=RunSettings(compute=CPU))
    assert (found.layers, found.new_tokens, len(found.runs)) == (8, 4, 3)
    assert found.tokens_per_second == sorted(found.runs)[1] > 0
    assert (found.device, found.dtype) == ("cpu", "float32")
    assert found.weights == sum(p.stat().st_size for p in llama.glob("*.safetensors")) - _header_bytes(llama)


def _header_bytes(directory: Path) -> int:
    path = directory / "model.safetensors"
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_speed_side_by_side(llama: Path, tmp_path: Path) -> None:
    small = save_llama(tmp_path / "small", 2)
    run = ["speed", str(small), "--against", str(llama), "--new-tokens", "4", "--repeat", "1", "--device", "cpu"]
    found = json.loads(_invoke(*run, "--json").stdout.splitlines()[-1])["models"]
    assert [model["layers"] for model in found] == [2, 8]
    alone = _invoke("speed", str(small), "--new-tokens", "4", "--repeat", "2", "--device", "cpu").stdout
    slowest, fastest = map(float, alone.splitlines()[1].split()[-2:])
    assert 0 < slowest <= float(alone.splitlines()[1].split()[-3]) <= fastest
    assert "median of 2 runs" in alone
    gone = CliRunner().invoke(app, [*run[:3], str(tmp_path / "gone"), *run[4:]])
    assert gone.exit_code == 1
    assert "does not exist" in gone.output


def test_speed_refuses_what_does_not_fit(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="repeat is 0; it must be at least 1"):
        speed(llama, repeat=0, settings=RunSettings(compute=CPU))
    monkeypatch.setattr(speeds, "free_ram", lambda: 1000)
    with pytest.raises(BudgetError, match=r"the model takes .* as a whole and 1 kB are free"):
        speed(llama, settings=RunSettings(compute=CPU))
