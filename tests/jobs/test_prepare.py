"""What a dry run says is what the run then does: with left-over work, a finished output, space that is taken."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from streamcollapse.cli.main import app

METHOD = ["--strategy", "laco", "-C", "3", "-I", "1", "-T", "0.3", "--rule", "mean", "--device", "cpu"]


def _prune(source: Path, out: Path, *more: str) -> Any:
    return CliRunner().invoke(
        app, ["prune", str(source), "--out", str(out), *METHOD, "--max-shard-size", "30kB", *more]
    )


def _same(source: Path, out: Path, *more: str) -> Any:
    """The dry run, which must end as the run after it does, in the same words if they are an error's."""
    dry = _prune(source, out, *more, "--dry-run")
    real = _prune(source, out, *more)
    assert dry.exit_code == real.exit_code
    if real.exit_code:
        assert dry.stderr == real.stderr
    return dry


def _interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A run that is broken off when it calls ``place``, a method of the work directory."""
    module = pytest.importorskip("streamcollapse.run.work_directory")
    with monkeypatch.context() as broken:

        def stop(*given: Any) -> None:
            raise KeyboardInterrupt

        broken.setattr(module.WorkDirectory, place, stop)
        assert _prune(source, out).exit_code == 130


def test_work_of_another_run_is_refused_by_both(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _interrupted(llama, out, monkeypatch, "shard_done")
    refused = _same(llama, out, "--max-tokens", "7")
    assert refused.exit_code == 1
    assert ".out.work: belongs to another run: its calibration is" in refused.stderr
    assert _same(llama, out).exit_code == 0, "the run itself goes on"
    assert not (tmp_path / ".out.work").exists()


def test_an_output_that_has_its_name_already_is_no_obstacle(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _interrupted(llama, out, monkeypatch, "remove")  # the very last thing that a run does
    assert (out / "streamcollapse_plan.json").is_file()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert _prune(llama, out, "--dry-run").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "a dry run tidies nothing up"
    assert _prune(llama, out).exit_code == 0
    again = _same(llama, out)
    assert again.exit_code == 1
    assert "exists; choose another --out" in again.stderr


def test_space_that_the_run_holds_already_is_not_needed_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _interrupted(llama, out, monkeypatch, "shard_done")
    weights, usage = (llama / "model.safetensors").stat().st_size, shutil.disk_usage

    def almost_full(path: Path) -> SimpleNamespace:
        staged = sum(file.stat().st_size for file in tmp_path.glob(".out.partial/*"))
        return SimpleNamespace(free=weights + 20_000 - staged, total=usage(path).total, used=0)

    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    assert almost_full(tmp_path).free < weights // 2
    assert _same(llama, out).exit_code == 0
