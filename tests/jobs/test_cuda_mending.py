"""Repair and healing on the real device: as far as on the processor, and to the same bits, whatever happens."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streamcollapse import Healing, Plan, apply, heal, perplexity, resume, verify
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.progress import Event, StepLearned
from streamcollapse.run.held_out import unjudged_text
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Compute, EvaluationText, Judging, Repair, RunSettings, Streaming
from streamcollapse.storage.staging import work_of
from tests.checkpoints import BUNDLED

pytestmark = pytest.mark.gpu
KEPT = (*range(8), *range(13, 24))
MODES = [("cuda", "float32"), ("cuda", "bfloat16")]


def quiet(device: str, dtype: str = "float32", **more: Any) -> RunSettings:
    return RunSettings(Compute(device, dtype), judging=Judging(verdict=False), **more)


def same(one: Path, other: Path) -> bool:
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fit.txt"
    path.write_text(unjudged_text()[:24_000])
    return path


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    job = open_job(BUNDLED, quiet("cpu"))
    layers = tuple(PlanLayer(n, {n: 1.0}) for n in KEPT)
    return Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), layers)


@pytest.fixture(scope="module")
def pruned(cut: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return apply(BUNDLED, cut, tmp_path_factory.mktemp("pruned") / "out", settings=quiet("cuda")).out


@pytest.mark.parametrize("method", ["linear", "local", "magnitude", "auto"])
def test_a_repair_comes_as_far_as_on_the_processor(method: str, cut: Plan, text: Path, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        how = quiet(device, repair=Repair(method, text, 4096))
        record = apply(BUNDLED, cut, tmp_path / device, settings=how).plan.repair
        assert record is not None
        assert record.is_kept, (method, device)
        found[device] = record
    cpu, cuda = found["cpu"], found["cuda"]
    assert cuda.loss_before == pytest.approx(cpu.loss_before, rel=1e-5)
    gained = {name: one.loss_before - one.loss_after for name, one in found.items()}
    assert gained["cuda"] == pytest.approx(gained["cpu"], rel=0.05)
    assert verify(tmp_path / "cuda", BUNDLED).recomputed > 0


@pytest.mark.parametrize(("device", "dtype"), MODES)
@pytest.mark.parametrize("method", ["linear", "auto"])
def test_a_repair_ends_in_the_same_bits_within_a_budget(
    device: str, dtype: str, method: str, cut: Plan, text: Path, tmp_path: Path
) -> None:
    for name, streaming in (("one", Streaming()), ("other", Streaming()), ("short", Streaming(vram_budget="2GiB"))):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(0)
        how = quiet(device, dtype, repair=Repair(method, text, 4096), streaming=streaming)
        usage = apply(BUNDLED, cut, tmp_path / name, settings=how).report["usage"]
        if name == "short":
            assert usage["peak_vram_reserved"] <= before + (2 << 30)
    assert same(tmp_path / "one", tmp_path / "other")
    assert same(tmp_path / "one", tmp_path / "short")


@pytest.mark.parametrize("train", ["lora", "cuts", "last:2+head"])
def test_steps_are_those_of_the_processor(train: str, pruned: Path, text: Path, tmp_path: Path) -> None:
    how = Healing(BUNDLED, file=text, train=train, tokens=4096, length=128, batch_tokens=512, rank=8, judge_every=2)
    found = {}
    for device in ("cpu", "cuda"):
        done = heal(pruned, tmp_path / device, how, settings=quiet(device))
        found[device] = done.report["healing"]["losses"], done.plan.heal
    (ours, record), (theirs, expected) = found["cuda"], found["cpu"]
    assert len(ours) == len(theirs) >= 6
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert record.before == pytest.approx(expected.before, rel=1e-4)
    assert record.after == pytest.approx(expected.after, rel=5e-3)
    assert record.after < record.before


@pytest.fixture(params=["lora", "cuts"])
def healing(request: pytest.FixtureRequest, text: Path) -> Healing:
    return Healing(BUNDLED, file=text, train=request.param, tokens=4096, batch_tokens=1024, rank=8, judge_every=2)


@pytest.mark.parametrize(("device", "dtype"), MODES)
def test_healing_ends_in_the_same_bits(
    device: str, dtype: str, healing: Healing, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again, with hidden states in files, within a budget of the device, and after a break."""
    how = quiet(device, dtype)
    whole = heal(pruned, tmp_path / "whole", healing, settings=how).out
    assert same(whole, heal(pruned, tmp_path / "again", healing, settings=how).out)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(0)
    short = replace(how, streaming=Streaming(vram_budget="2GiB"))
    done = heal(pruned, tmp_path / "short", healing, settings=short)
    assert done.report["usage"]["peak_vram_reserved"] <= before + (2 << 30)
    assert same(whole, done.out)
    monkeypatch.setattr("streamcollapse.jobs.healing._SAVE_SECONDS", 0.0)
    monkeypatch.setattr("streamcollapse.jobs.healing._SAVE_SHARE", math.inf)

    def breaking(event: Event) -> None:
        if isinstance(event, StepLearned) and event.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="resume with"):
        heal(pruned, tmp_path / "broken", healing, settings=how, listener=breaking)
    resume(work_of(tmp_path / "broken"))
    assert same(whole, tmp_path / "broken")


def test_what_comes_out_has_the_same_loss_on_both(pruned: Path, text: Path, tmp_path: Path) -> None:
    short = EvaluationText(text, max_tokens=1000)
    losses = [perplexity(pruned, short, settings=quiet(device)).nll for device in ("cpu", "cuda")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
