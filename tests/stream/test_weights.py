"""Passes over the weights: whatever the way of reading, the same bytes, each once; and no slot is used too early."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.resources.meter import Meter
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.stream.loaders import DeviceLoader, Loaded, Loader, MappedLoader, PlainLoader, ReadLoader
from streamcollapse.stream.weights import Limits, WeightStream
from tests.checkpoints import llama_config, save_llama, save_model
from tests.streams import CPU, StandInCopies, StandInDevice

SLOW = {"delay": 0.003}
LOADERS: dict[str, Callable[[Checkpoint], Loader]] = {
    "plain": lambda c: PlainLoader(c, CPU),
    "mapped": lambda c: MappedLoader(c, drop_after_use=False),
    "mapped, dropped": lambda c: MappedLoader(c, drop_after_use=True),
    "read": lambda c: ReadLoader(c, direct=False),
    "direct": lambda c: ReadLoader(c, direct=True),
    "device": lambda c: DeviceLoader(c, False, StandInCopies()),
    "slow device": lambda c: DeviceLoader(c, False, StandInCopies(delay=0.003)),
    "device with slow computation": lambda c: DeviceLoader(c, True, StandInCopies(computing=0.003)),
}


def _steps(checkpoint: Checkpoint) -> list[list[str]]:
    """Layer after layer from the third on, as sweeps go: some layers return later, some steps need nothing new."""
    layers = [[n for n in checkpoint.names if f"layers.{i}." in n] for i in range(8)]
    return [[], layers[2] + layers[3], layers[3], layers[4], [], layers[5] + layers[2][:3], layers[6], layers[7]]


def _stream(checkpoint: Checkpoint, loader: Loader, prefetch: int, **options: Any) -> WeightStream:
    size = max(sum(loader.size([n]) for n in checkpoint.names if f"layers.{i}." in n) for i in range(8))
    limits = Limits(prefetch, size, options.pop("slot_budget", None))
    return WeightStream(checkpoint, CPU, loader, Meter(CPU), limits, **options)


def _read_all(stream: WeightStream, steps: list[list[str]]) -> list[dict[str, torch.Tensor]]:
    found = []
    with stream.run(steps) as weights:
        for names in steps:
            with weights.step():
                found.append({name: weights.read(name, CPU).clone() for name in names})
    return found


def _same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", LOADERS)
def test_every_way_of_reading_gives_the_same_bytes(llama_bf16: Path, kind: str, prefetch: int) -> None:
    checkpoint = Checkpoint(llama_bf16)
    steps = _steps(checkpoint)
    expected = [{name: checkpoint.read(name, CPU) for name in names} for names in steps]
    stream = _stream(checkpoint, LOADERS[kind](checkpoint), prefetch)
    for _ in range(3):  # slots are used again
        assert _same(_read_all(stream, steps), expected)
    once = sum(checkpoint.info(name).num_bytes for name in {name for names in steps for name in names})
    assert 3 * once <= stream.meter.bytes_read < 3.05 * once, "each tensor is read once in a pass"


@pytest.mark.parametrize("kind", ["mapped, dropped", "read", "direct", "slow device"])
def test_what_stays_is_read_in_the_first_pass_only(llama_bf16: Path, kind: str) -> None:
    checkpoint = Checkpoint(llama_bf16)
    steps = _steps(checkpoint)
    keep = {name for names in steps[-2:] for name in names}
    stream = _stream(checkpoint, LOADERS[kind](checkpoint), 2, keep=keep)
    expected = [{name: checkpoint.read(name, CPU) for name in names} for names in steps]
    assert _same(_read_all(stream, steps), expected)
    first = stream.meter.bytes_read
    assert set(stream.resident) == keep
    assert _same(_read_all(stream, steps), expected)
    kept = sum(checkpoint.info(name).num_bytes for name in keep)
    assert stream.meter.bytes_read - first == pytest.approx(first - kept, rel=0.05)


def test_without_room_for_the_slots_tensors_are_read_when_they_are_asked_for(llama_bf16: Path) -> None:
    checkpoint = Checkpoint(llama_bf16)
    steps = _steps(checkpoint)
    expected = [{name: checkpoint.read(name, CPU) for name in names} for names in steps]
    loader = ReadLoader(checkpoint, direct=False)
    stream = _stream(checkpoint, loader, 2, slot_budget=1)
    assert _same(_read_all(stream, steps), expected)
    assert stream.meter.bytes_read == 0, "nothing went through a slot"


def test_without_slots_another_way_can_take_over(llama_bf16: Path) -> None:
    checkpoint = Checkpoint(llama_bf16)
    steps = _steps(checkpoint)
    expected = [{name: checkpoint.read(name, CPU) for name in names} for names in steps]
    fallback = MappedLoader(checkpoint, drop_after_use=True)
    stream = _stream(checkpoint, ReadLoader(checkpoint, direct=False), 2, slot_budget=1, fallback=fallback)
    assert _same(_read_all(stream, steps), expected)
    assert stream.meter.bytes_read == sum(checkpoint.info(n).num_bytes for n in {n for names in steps for n in names})


def test_small_units_that_wait_take_no_slot(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(llama_config(hidden_size=256, intermediate_size=512), tmp_path / "m"))
    layers = [[n for n in checkpoint.names if f"layers.{i}." in n] for i in range(8)]
    norms = [[n for n in names if "norm" in n] for names in layers]
    steps = [*layers[:7], layers[7] + [n for names in norms for n in names]]  # all norms are needed until the end
    copies = StandInCopies()
    expected = [{name: checkpoint.read(name, CPU) for name in names} for names in steps]
    assert _same(_read_all(_stream(checkpoint, DeviceLoader(checkpoint, False, copies), 2), steps), expected)
    large = [size for kind, size in copies.blocks if kind == "device" and size > 1 << 20]
    assert len(large) == 3, "one in use and two ahead, whatever waits"


def test_the_number_of_slots_is_what_is_held_and_what_is_ahead(llama_bf16: Path) -> None:
    checkpoint = Checkpoint(llama_bf16)
    copies = StandInCopies()
    layers = [[n for n in checkpoint.names if f"layers.{i}." in n] for i in range(8)]
    _read_all(_stream(checkpoint, DeviceLoader(checkpoint, False, copies), 2), layers)
    kinds = [kind for kind, _ in copies.blocks]
    assert kinds.count("host") == 3
    assert kinds.count("device") == 3
    assert copies.copies == 8
    assert copies.waited_for_compute == 5, "a slot is filled again only after the computation that used it"


def test_a_tensor_that_its_file_does_not_align(tmp_path: Path) -> None:
    from tests.checkpoints import write_raw

    values = torch.arange(6, dtype=torch.float32)
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [6], "data_offsets": [3, 27]},
    }
    (tmp_path / "m").mkdir()
    write_raw(tmp_path / "m" / "model.safetensors", header, bytes(3) + values.numpy().tobytes())
    checkpoint = Checkpoint(tmp_path / "m")
    for kind in LOADERS:
        stream = WeightStream(checkpoint, CPU, LOADERS[kind](checkpoint), Meter(CPU), Limits(1, 1 << 20))
        assert torch.equal(_read_all(stream, [["a", "b"]])[0]["b"], values), kind


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_copy_that_fails_ends_the_pass_and_the_next_one_works(llama_bf16: Path, prefetch: int) -> None:
    checkpoint = Checkpoint(llama_bf16)
    steps = _steps(checkpoint)
    expected = [{name: checkpoint.read(name, CPU) for name in names} for names in steps]
    for number in range(1, 7):
        stream = _stream(checkpoint, DeviceLoader(checkpoint, False, StandInCopies(fail_at=number)), prefetch)
        with pytest.raises(RuntimeError, match="the copy failed"):
            _read_all(stream, steps)
        assert _same(_read_all(stream, steps), expected)


@pytest.mark.parametrize("kind", ["mapped", "read", "direct", "slow device"])
def test_a_file_that_was_cut_short_is_an_error_not_a_crash(tmp_path: Path, kind: str) -> None:
    directory = save_llama(tmp_path / "m")
    checkpoint = Checkpoint(directory)
    stream = _stream(checkpoint, LOADERS[kind](checkpoint), 2)
    checkpoint.mappings()
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="changed size while it was in use"):
        _read_all(stream, _steps(checkpoint))


@pytest.mark.parametrize("kind", ["mapped", "read", "direct", "slow device"])
def test_a_pass_that_is_broken_off_leaves_nothing_behind(llama_bf16: Path, kind: str) -> None:
    checkpoint = Checkpoint(llama_bf16)
    steps = _steps(checkpoint)
    stream = _stream(checkpoint, LOADERS[kind](checkpoint), 3)
    for stop_after in range(1, 5):
        with pytest.raises(KeyboardInterrupt), stream.run(steps) as weights:
            for _ in range(stop_after):
                with weights.step():
                    pass
            raise KeyboardInterrupt
    expected = [{name: checkpoint.read(name, CPU) for name in names} for names in steps]
    assert _same(_read_all(stream, steps), expected)


def test_weights_come_while_the_computation_runs(llama_bf16: Path) -> None:
    checkpoint = Checkpoint(llama_bf16)

    class Slow(PlainLoader):
        def load(self, names: Any, own_memory: bool) -> Loaded:
            time.sleep(0.02)
            events.append("loaded")
            return super().load(names, own_memory)

    events: list[str] = []
    layers = [[n for n in checkpoint.names if f"layers.{i}." in n] for i in range(8)]
    stream = WeightStream(checkpoint, CPU, Slow(checkpoint, CPU), Meter(CPU), Limits(2))
    with stream.run(layers) as weights:
        for _ in layers:
            with weights.step():
                time.sleep(0.06)
                events.append("computed")
    runs = [len(list(group)) for key, group in itertools.groupby(events) if key == "loaded"]
    assert runs[0] >= 3, "two units ahead of the first computation's end"
    assert max(itertools.accumulate(1 if e == "loaded" else -1 for e in events)) <= 3, "and never more"


def test_slots_are_filled_by_threads_in_and_out_of_inference_mode(llama_bf16: Path) -> None:
    checkpoint = Checkpoint(llama_bf16)
    layers = [[n for n in checkpoint.names if f"layers.{i}." in n] for i in range(8)]
    for make in (StandInCopies, StandInDevice):
        loader = DeviceLoader(checkpoint, False, make())
        with torch.inference_mode():
            assert _same(
                _read_all(_stream(checkpoint, loader, 0), layers), _read_all(_stream(checkpoint, loader, 2), layers)
            )
        loader.close()


def test_pinned_memory_is_kept_while_it_is_large_enough(llama_bf16: Path) -> None:
    checkpoint = Checkpoint(llama_bf16)
    device = StandInDevice()
    loader = DeviceLoader(checkpoint, False, device)
    registered = []
    for slots, slot_bytes in ((3, 1 << 20), (6, 1 << 20), (2, 1 << 19), (6, 1 << 21)):
        loader.start(slots, slot_bytes)
        loader.load(checkpoint.names[:1], own_memory=False).release()
        loader.finish()
        registered.append(device.registered)
    assert registered == [1, 2, 3, 1], "more slots on the device need no new ones here, larger ones do"
    loader.close()
    assert device.registered == 0
