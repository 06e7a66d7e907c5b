from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from streamcollapse.stream.allocator import steady_heap

CODE = """
import resource
import torch
from streamcollapse.stream.allocator import steady_heap
from streamcollapse.stream.memory import sample_memory
{call}
torch.set_num_threads(1)
kept = torch.ones(1000)
before = sample_memory().anonymous
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    a = torch.ones(700_000)  # 2.8 MB
    b = torch.ones(1_000_000)
    del a, b
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults, sample_memory().anonymous - before)
large = torch.ones(12_000_000)  # 48 MB
del large
print(sample_memory().anonymous - before)
"""


def test_activations_are_not_mapped_anew_and_large_blocks_leave_the_process() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert steady_heap() is False
        pytest.skip("not glibc")
    assert steady_heap() is True

    def run(call: str) -> list[int]:
        code = [sys.executable, "-c", CODE.format(call=call)]
        return [int(number) for number in subprocess.run(code, capture_output=True, check=True).stdout.split()]

    pages = 6_800_000 // 4096
    # How the blocks find room among what the imports left free differs a little from process to process.
    faults, free, after_large = min((run("steady_heap()") for _ in range(5)), key=lambda found: found[1])
    assert faults < 10 * pages, "not every time"
    assert free < 6_800_000 + (10 << 20), "and not much more than stays at the top of the heap"
    assert after_large < free + 10_000_000
    assert run("import ctypes; ctypes.CDLL(None).mallopt(-3, 1 << 20)")[0] > 25 * pages, "the price of mapping each"
