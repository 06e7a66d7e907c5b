"""The real device: what the stand-ins promise elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamcollapse import CollapseOptions, Compute, prune, search
from streamcollapse.settings import Streaming
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.stream.copies import CudaCopies
from streamcollapse.stream.loaders import DeviceLoader
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.weights import WeightStream

pytestmark = pytest.mark.gpu
OPTIONS = CollapseOptions(layers_per_merge=3, interval=1, threshold=0.55, rule="mean")


def test_what_arrives_is_what_is_stored_while_the_device_is_busy(llama_bf16: Path) -> None:
    device = torch.device("cuda", 0)
    checkpoint = Checkpoint(llama_bf16)
    layers = [[n for n in checkpoint.names if f"layers.{i}." in n] for i in range(8)]
    loader = DeviceLoader(checkpoint, False, CudaCopies(device))
    size = max(sum(loader.size([n]) for n in names) for names in layers)
    stream = WeightStream(checkpoint, device, loader, Meter(device), 2, size)
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


def test_pinned_memory_has_its_exact_size_and_can_be_let_go() -> None:
    copies = CudaCopies(torch.device("cuda", 0))
    block = copies.host_block(3 << 20)
    assert block.numel() == 3 << 20
    assert block.data_ptr() % 4096 == 0
    target = copies.device_block(3 << 20)
    copies.wait(copies.upload(target, block.fill_(7), None))
    assert int(target.sum(dtype=torch.int64)) == 7 * (3 << 20)
    copies.free()
    copies.free()
    assert copies.rate(1 << 24) > 1e8


@pytest.mark.parametrize("io", ["pread", "direct", "auto"])
def test_no_bit_depends_on_how_weights_get_there(llama_bf16: Path, io: str) -> None:
    compute = Compute("cuda", "bfloat16")
    plain = search(llama_bf16, OPTIONS, compute=compute, streaming=Streaming(1, 0, "mmap"))
    for lookahead, prefetch in ((1, 2), (8, 1), (None, 4)):
        assert search(llama_bf16, OPTIONS, compute=compute, streaming=Streaming(lookahead, prefetch, io)) == plain


def test_the_device_and_the_processor_agree(llama_bf16: Path, tmp_path: Path) -> None:
    plans = {name: search(llama_bf16, OPTIONS, compute=Compute(name, "float32")) for name in ("cpu", "cuda")}
    decisions = {name: plan.search.decisions for name, plan in plans.items() if plan.search is not None}
    for ours, theirs in zip(decisions["cuda"], decisions["cpu"], strict=True):
        assert (ours.l, ours.merged, ours.accepted) == (theirs.l, theirs.merged, theirs.accepted)
        assert ours.similarity == pytest.approx(theirs.similarity, abs=1e-4)
    pruned = prune(llama_bf16, tmp_path / "out", OPTIONS, compute=Compute("cuda", "bfloat16"))
    assert all(phase["peak_vram"] > 0 for phase in pruned.report["usage"]["phases"])
