"""Whole jobs whose weights go through a device that keeps to CUDA's rules and to nothing more."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamcollapse import Calibration, Compute, Plan, SearchOptions, prune, resume, search
from streamcollapse.arch.skeleton import DecoderStack
from streamcollapse.errors import BudgetError, DeviceFailedError
from streamcollapse.progress import Event, WarningRaised
from streamcollapse.resources.device import GPU_GRAIN, Placement
from streamcollapse.run import opened
from streamcollapse.run.opened import open_job
from streamcollapse.searches import evaluator
from streamcollapse.settings.run import Repair, RunSettings, Streaming
from streamcollapse.stream.loaders import DeviceLoader
from tests.jobs.test_streaming import allotted  # noqa: F401 - a fixture
from tests.streams import StandInDevice

FLOAT32 = Compute("cpu", "float32")
SHARDS = ("model.safetensors", "streamcollapse_plan.json")
Use = Callable[..., StandInDevice]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Have every following job load its weights by way of a stand-in; at the end no rule may have been broken."""
    used: list[StandInDevice] = []
    original = DecoderStack.run

    def install(**behaviour: Any) -> StandInDevice:
        device = StandInDevice(**behaviour)
        used.append(device)
        monkeypatch.setattr(opened, "_loader", lambda job, choice: DeviceLoader(job.overlay, False, device))

        def run(stack: DecoderStack, index: int, tensors: Any, *rest: Any) -> torch.Tensor:
            device.compute(tensors.values())
            return original(stack, index, tensors, *rest)

        monkeypatch.setattr(DecoderStack, "run", run)
        return device

    yield install
    gc.collect()
    for device in used:
        assert not device.broken_rules
        assert device.registered == 0, "pinned memory is let go of when the job ends"
        assert device.held == 0, "and so is the device's"


def _options(rule: str, **changes: Any) -> SearchOptions:
    return SearchOptions(layers_per_merge=3, interval=1, threshold=0.55, rule=rule, **changes)


def _files(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in SHARDS]


@pytest.mark.parametrize("late", [{"delay": 0.002}, {"computing": 0.004}, {"delay": 0.002, "computing": 0.002}])
@pytest.mark.parametrize(("rule", "prefetch", "resident"), [("sequential", 2, 0), ("mean", 0, 3), ("best", 6, 0)])
def test_a_whole_prune_keeps_to_the_rules_of_the_device(
    llama_bf16: Path,
    tmp_path: Path,
    rule: str,
    prefetch: int,
    resident: int,
    late: dict[str, float],
    use: Use,
    allotted: Any,  # noqa: F811
) -> None:
    prune(
        llama_bf16,
        tmp_path / "plain",
        _options(rule),
        settings=RunSettings(compute=FLOAT32, streaming=Streaming(1, 0, "mmap")),
    )
    device = use(**late)
    allotted(resident_layers=resident)
    prune(
        llama_bf16,
        tmp_path / "out",
        _options(rule),
        settings=RunSettings(compute=FLOAT32, streaming=Streaming(4, prefetch)),
    )
    assert _files(tmp_path / "out") == _files(tmp_path / "plain")
    assert device.copies > 20


@pytest.mark.parametrize("number", [1, 5, 12, 17, 24])
def test_an_error_that_comes_late_is_one_line_and_the_job_goes_on_afterwards(
    llama_bf16: Path,
    tmp_path: Path,
    number: int,
    use: Use,
    allotted: Any,  # noqa: F811
) -> None:
    allotted()
    out, streaming = tmp_path / "out", Streaming(2)
    prune(llama_bf16, tmp_path / "plain", _options("mean"), settings=RunSettings(compute=FLOAT32, streaming=streaming))
    use(fails_at=number, delay=0.001)
    with pytest.raises(DeviceFailedError) as caught:
        prune(llama_bf16, out, _options("mean"), settings=RunSettings(compute=FLOAT32, streaming=streaming))
    said = str(caught.value)
    assert "the device failed: CUDA error: an illegal memory access was encountered; this process" in said
    assert "\n" not in said
    assert not out.exists()
    use()
    if "resume" in said:
        resume(tmp_path / ".out.work")
    else:
        prune(llama_bf16, out, _options("mean"), settings=RunSettings(compute=FLOAT32, streaming=streaming))
    assert _files(out) == _files(tmp_path / "plain")


@pytest.mark.parametrize("room", [1, 2])
@pytest.mark.parametrize("rule", ["sequential", "best"])
@pytest.mark.parametrize("strategy", ["laco", "greedy"])
def test_where_memory_runs_out_in_a_sweep_it_takes_fewer_candidates(
    llama_bf16: Path, strategy: str, rule: str, room: int, monkeypatch: pytest.MonkeyPatch, use: Use
) -> None:
    options = {"laco": _options(rule), "greedy": SearchOptions(strategy="greedy", rule=rule, target_layers=6)}[strategy]
    settings = RunSettings(FLOAT32, Calibration("sentences"))
    plain = search(llama_bf16, options, settings=settings)
    sweep, asked, heard = evaluator.sweep, [], []

    def narrow(model: Any, stacks: Any, *rest: Any) -> Any:
        asked.append(len(stacks))
        if len(stacks) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sweep(model, stacks, *rest)

    def listen(event: Event) -> None:
        if isinstance(event, WarningRaised):
            heard.append(event.text)

    monkeypatch.setattr(evaluator, "sweep", narrow)
    use()
    found = search(llama_bf16, options, settings=replace(settings, streaming=Streaming(16)), listener=listen)
    assert found == plain
    too_many = [number for number, count in enumerate(asked) if count > room]
    assert too_many
    assert heard == ["GPU memory ran out; going on with fewer candidates in a pass"] * len(too_many)
    assert max(asked) <= asked[too_many[0]], "what ran out once is not tried again"


def test_where_memory_runs_out_no_layer_stays(llama_bf16: Path, use: Use, allotted: Any) -> None:  # noqa: F811
    options, streaming = _options("sequential"), Streaming(1, 0)
    plain = search(llama_bf16, options, settings=RunSettings(compute=FLOAT32))
    allotted(resident_layers=8)
    roomy = use()
    assert search(llama_bf16, options, settings=RunSettings(compute=FLOAT32, streaming=streaming)) == plain
    assert roomy.copies == 8, "each layer comes once"
    narrow = use(capacity=roomy.peak - 1)
    assert search(llama_bf16, options, settings=RunSettings(compute=FLOAT32, streaming=streaming)) == plain
    assert narrow.copies > 16, "none stayed"


def test_where_nothing_helps_it_is_one_line(llama_bf16: Path, tmp_path: Path, use: Use) -> None:
    use(capacity=1000)
    with pytest.raises(BudgetError, match=r"^cpu: GPU memory ran out; pass a smaller `vram_budget`, or end what else"):
        prune(llama_bf16, tmp_path / "out", _options("mean"), settings=RunSettings(compute=FLOAT32))
    assert not list(tmp_path.iterdir())


def test_two_jobs_of_one_process_pin_memory_anew(llama_bf16: Path, use: Use) -> None:
    device = use()
    found: list[Plan] = [search(llama_bf16, _options("mean"), settings=RunSettings(compute=FLOAT32)) for _ in range(2)]
    assert found[0] == found[1]
    assert device.registered == 0


def test_as_much_at_once_as_on_a_gpu_decides_the_same(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, sentences = SearchOptions(target_layers=22), Calibration("sentences")
    how = RunSettings(FLOAT32, sentences, repair=Repair("linear", None, 4096))
    found = [prune(bundled, tmp_path / "as on a CPU", options, settings=how)]
    usual = open_job(bundled, how).call_tokens
    monkeypatch.setattr(Placement, "grain", GPU_GRAIN)
    assert open_job(bundled, how).call_tokens == GPU_GRAIN * usual
    found.append(prune(bundled, tmp_path / "as on a GPU", options, settings=how))
    one, other = (done.plan for done in found)
    assert [layer.base for layer in one.layers] == [layer.base for layer in other.layers]
    assert one.repair is not None
    assert other.repair is not None
    assert other.repair.loss_after == pytest.approx(one.repair.loss_after, rel=1e-4)
    verdicts = [done.report["held_out"] for done in found]
    assert all(verdicts)
    assert verdicts[0]["loss"]["after"] == pytest.approx(verdicts[1]["loss"]["after"], rel=1e-4)
