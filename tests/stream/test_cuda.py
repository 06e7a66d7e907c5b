"""The real device: what the stand-ins promise elsewhere."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from streamcollapse import Compute, SearchOptions, prune, search
from streamcollapse.errors import BudgetError
from streamcollapse.merge.mixing import mix_tensors
from streamcollapse.resources.device import device_errors, free_vram, within_vram
from streamcollapse.resources.meter import Meter
from streamcollapse.settings.run import RunSettings, Streaming
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.stream.copies import CudaCopies
from streamcollapse.stream.loaders import DeviceLoader
from streamcollapse.stream.weights import Limits, WeightStream

pytestmark = pytest.mark.gpu
OPTIONS = SearchOptions(layers_per_merge=3, interval=1, threshold=0.55, rule="mean")


def test_what_arrives_is_what_is_stored_while_the_device_is_busy(llama_bf16: Path) -> None:
    device = torch.device("cuda", 0)
    checkpoint = Checkpoint(llama_bf16)
    layers = [[n for n in checkpoint.names if f"layers.{i}." in n] for i in range(8)]
    loader = DeviceLoader(checkpoint, False, CudaCopies(device))
    size = max(sum(loader.size([n]) for n in names) for names in layers)
    stream = WeightStream(checkpoint, device, loader, Meter(device), Limits(2, size))
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        sums = []
        with stream.run(layers) as weights:
            for names in layers:
                with weights.step():
                    for _ in range(5):
                        busy = torch.tanh(busy @ busy)  # the weights are read late, when their slot is long given back
                    sums.append({n: weights.read(n, device).float().sum() + 0.0 * busy[0, 0] for n in names})
        for found, names in zip(sums, layers, strict=True):
            for name in names:
                expected = checkpoint.read(name, torch.device("cpu")).to(device).float().sum()
                assert torch.equal(found[name], expected), name
    stream.close()


def test_memory_of_copies_that_nobody_let_go_of_can_be_pinned_again() -> None:
    copies = CudaCopies(torch.device("cuda", 0))
    block = copies.host_block(3 << 20)
    address = block.data_ptr()
    del copies
    gc.collect()
    assert int(torch.cuda.cudart().cudaHostRegister(address, 3 << 20, 0)) == 0  # type: ignore[no-untyped-call]
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def test_pinned_memory_has_its_exact_size_and_can_be_let_go() -> None:
    copies = CudaCopies(torch.device("cuda", 0))
    block = copies.host_block(3 << 20)
    assert block.numel() == 3 << 20
    assert block.data_ptr() % 4096 == 0
    target = copies.device_block(3 << 20)
    copies.wait(copies.upload(target, block.fill_(7), None))
    assert int(target.sum(dtype=torch.int64)) == 7 * (3 << 20)
    address = block.data_ptr()
    copies.free()
    copies.free()
    assert copies.rate(1 << 24) > 1e8
    assert int(torch.cuda.cudart().cudaHostRegister(address, 3 << 20, 0)) == 0, "it was let go of"  # type: ignore[no-untyped-call]
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("io", ["pread", "direct", "auto"])
def test_no_bit_depends_on_how_weights_get_there(llama_bf16: Path, io: str) -> None:
    compute = Compute("cuda", "bfloat16")
    plain = search(llama_bf16, OPTIONS, settings=RunSettings(compute=compute, streaming=Streaming(1, 0, "mmap")))
    for lookahead, prefetch in ((1, 2), (8, 1), (None, 4)):
        assert (
            search(
                llama_bf16, OPTIONS, settings=RunSettings(compute=compute, streaming=Streaming(lookahead, prefetch, io))
            )
            == plain
        )


def test_the_device_and_the_processor_agree(llama_bf16: Path, tmp_path: Path) -> None:
    plans = {
        name: search(llama_bf16, OPTIONS, settings=RunSettings(compute=Compute(name, "float32")))
        for name in ("cpu", "cuda")
    }
    decisions = {name: plan.search.decisions for name, plan in plans.items() if plan.search is not None}
    for ours, theirs in zip(decisions["cuda"], decisions["cpu"], strict=True):
        assert (ours.l, ours.merged, ours.accepted) == (theirs.l, theirs.merged, theirs.accepted)
        assert ours.similarity == pytest.approx(theirs.similarity, abs=1e-4)
    pruned = prune(llama_bf16, tmp_path / "out", OPTIONS, settings=RunSettings(compute=Compute("cuda", "bfloat16")))
    assert all(phase["peak_vram"] > 0 for phase in pruned.report["usage"]["phases"])


def test_a_job_leaves_nothing_behind(llama_bf16: Path) -> None:
    compute, streaming = Compute("cuda", "bfloat16"), Streaming(io="pread")
    plans, held = [], []
    for _ in range(3):
        plans.append(search(llama_bf16, OPTIONS, settings=RunSettings(compute=compute, streaming=streaming)))
        gc.collect()
        held.append(torch.cuda.memory_allocated(0))
    assert plans[0] == plans[1] == plans[2]
    assert held[1] == held[2], "beyond what the libraries keep after their first use"


def test_the_allocator_stays_within_the_budget(llama_bf16: Path, tmp_path: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(0)
    streaming = Streaming(vram_budget="400MiB", io="pread")
    pruned = prune(
        llama_bf16,
        tmp_path / "out",
        OPTIONS,
        settings=RunSettings(compute=Compute("cuda", "bfloat16"), streaming=streaming),
    )
    assert all(p["peak_vram_reserved"] <= before + (400 << 20) for p in pruned.report["usage"]["phases"])
    assert torch.cuda.get_per_process_memory_fraction(0) == 1.0


def test_memory_that_runs_out_is_one_line() -> None:
    device = torch.device("cuda", 0)
    with (
        pytest.raises(BudgetError, match=r"^cuda:0: GPU memory ran out: of .* this run held .*, others .*; pass"),
        device_errors(device),
        within_vram(device, 64 << 20),
    ):
        torch.empty(1 << 30, dtype=torch.uint8, device=device)


def test_where_others_have_most_of_the_memory_the_rest_suffices(llama_bf16: Path) -> None:
    compute, device = Compute("cuda", "bfloat16"), torch.device("cuda", 0)
    plain = search(llama_bf16, OPTIONS, settings=RunSettings(compute=compute))
    torch.cuda.empty_cache()
    others = torch.empty(free_vram(device) - (1 << 30), dtype=torch.uint8, device=device)
    assert search(llama_bf16, OPTIONS, settings=RunSettings(compute=compute)) == plain
    del others
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_mix_has_the_same_bits_on_both_devices(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1000, 1003, generator=generator).to(dtype) for _ in range(3)]
    for coefficients in ((1 / 3, 1 / 3, 1 / 3), (-1.0, 1.0, 1.0), (1.1, 0.25, -0.7)):
        terms = list(zip(coefficients, tensors, strict=True))
        there = mix_tensors([(c, t.cuda()) for c, t in terms], dtype).cpu()
        assert torch.equal(there, mix_tensors(terms, dtype)), coefficients
