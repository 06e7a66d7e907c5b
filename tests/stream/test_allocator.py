from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from streamcollapse.resources.device import steady_heap

CODE = """
import resource
import torch
from streamcollapse.resources.device import steady_heap
from streamcollapse.resources.meter import sample_memory
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


LARGER = """
import resource
import torch
from streamcollapse.resources.device import heap_for
from streamcollapse.resources.meter import sample_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        a = torch.ones(4_000_000)  # 16 MB
        b = torch.ones(3_000_000)
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
kept = torch.ones(1000)
with heap_for(0):
    small = faults()
before = sample_memory().anonymous
with heap_for(64_000_000):
    print(small, faults())
print(sample_memory().anonymous - before)
"""


def test_the_activations_of_a_call_come_from_the_heap_and_leave_it_after_the_call() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")

    def run() -> tuple[int, ...]:
        found = subprocess.run([sys.executable, "-c", LARGER], capture_output=True, check=True).stdout.split()
        return tuple(map(int, found))

    # As above: where the blocks find room differs a little from process to process.
    small, large, left = min((run() for _ in range(3)), key=lambda found: found[1])
    pages = 28_000_000 // 4096
    assert small > 15 * pages, "the price of mapping each"
    assert large < 3 * pages
    assert left < 8_000_000
