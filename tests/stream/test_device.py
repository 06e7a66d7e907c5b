from __future__ import annotations

import pytest
import torch

from streamcollapse.errors import BudgetError, DeviceError, DeviceFailedError, OptionError, is_of_device
from streamcollapse.resources import device
from streamcollapse.resources.device import Placement, device_errors, resolve, within_vram
from streamcollapse.settings.run import Compute


def test_explicit_settings_are_taken() -> None:
    assert resolve(Compute("cpu", "float16"), torch.float32) == Placement(torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native, "avx2": True})
    expected = torch.bfloat16 if native else torch.float32
    assert resolve(Compute("cpu"), torch.bfloat16).dtype == expected
    assert resolve(Compute("cpu"), torch.float16).dtype == torch.float32
    assert resolve(Compute("cpu"), torch.float32).dtype == torch.float32


def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device, "_gpu_multiplies_bfloat16", lambda device: device.index == 0)
    cuda = torch.device("cuda", 0)
    assert resolve(Compute(), torch.float16) == Placement(cuda, torch.float16)
    assert resolve(Compute("cuda"), torch.bfloat16) == Placement(cuda, torch.bfloat16)
    assert resolve(Compute("cuda:1"), torch.bfloat16).dtype == torch.float32, "not emulated"
    assert resolve(Compute("cuda:1", "bfloat16"), torch.bfloat16).dtype == torch.bfloat16, "unless it is asked for"
    assert resolve(Compute("cuda:1"), torch.float32) == Placement(torch.device("cuda", 1), torch.float32)
    with pytest.raises(DeviceError, match="cuda:2: this machine has 2 CUDA devices, numbered from 0"):
        resolve(Compute("cuda:2"), torch.float32)
    with pytest.raises(DeviceError, match=f"cuda:{10**30}: this machine has 2"):
        resolve(Compute(f"cuda:{10**30}"), torch.float32)


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve(Compute(), torch.float32).device == torch.device("cpu")
    with pytest.raises(DeviceError, match="device cuda: no CUDA device is available; pass `device=cpu`"):
        resolve(Compute("cuda"), torch.float32)


def test_settings_that_do_not_exist() -> None:
    for name in ("gpu", "cuda:", "cuda:-1", "mps", ""):
        with pytest.raises(OptionError, match="choose auto, cpu, cuda or cuda:N"):
            Compute(name)
    with pytest.raises(OptionError, match="compute dtype is 'int8'; choose one of auto, float32"):
        Compute("cpu", "int8")


def test_placing_copies_only_what_changes() -> None:
    placement = Placement(torch.device("cpu"), torch.float32)
    weights, ids = torch.ones(3), torch.arange(3)
    assert placement.place(weights) is weights
    assert placement.place(ids) is ids
    assert placement.place(weights.bfloat16()).dtype == torch.float32
    assert placement.dtype_name == "float32"


def test_native_bfloat16_is_asked_of_this_processor() -> None:
    assert device._cpu_multiplies_bfloat16() in (True, False)


def test_the_allocator_holds_to_a_limit_while_a_run_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[tuple[float, torch.device]] = []
    cuda = torch.device("cuda", 0)
    for name, value in (
        ("mem_get_info", lambda d: (500, 1000)),
        ("memory_allocated", lambda d: 100),
        ("get_per_process_memory_fraction", lambda d: 0.9),
        ("set_per_process_memory_fraction", lambda fraction, d: fractions.append((fraction, d))),
        ("empty_cache", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(KeyError), within_vram(cuda, 300):
        raise KeyError
    assert fractions == [(0.4, cuda), (0.9, cuda)]
    with within_vram(cuda, None), within_vram(torch.device("cpu"), 300), within_vram(cuda, 5000):
        pass
    assert fractions[2:] == [(0.9, cuda), (0.9, cuda)], "never more than before"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), BudgetError, "cpu: GPU memory ran out; pass a smaller"),
        (torch.AcceleratorError("CUDA error: unspecified\nmore"), DeviceFailedError, "CUDA error: unspecified; this"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), DeviceFailedError, "CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_what_a_device_reports_is_one_line(error: Exception, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said) as caught, device_errors(torch.device("cpu")):
        raise error
    assert "\n" not in str(caught.value)
    assert is_of_device(error)


def test_what_is_no_device_s_fault_goes_through() -> None:
    for error in (RuntimeError("shape mismatch"), ValueError("CUDA")):
        with pytest.raises(type(error)) as caught, device_errors(torch.device("cpu")):
            raise error
        assert caught.value is error
        assert not is_of_device(error)
