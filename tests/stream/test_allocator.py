from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from streamcollapse.stream.allocator import return_large_blocks

CODE = """
import torch
from streamcollapse.stream.allocator import return_large_blocks
from streamcollapse.stream.memory import sample_memory
{call}
del_me = torch.ones(7_000_000)  # 28 MB: freeing it raises glibc's threshold
del del_me
before = sample_memory().anonymous
blocks = [torch.ones(1_000_000) for _ in range(20)]
keep = blocks[-1]
del blocks
print(sample_memory().anonymous - before)
"""


def test_freed_blocks_leave_the_process() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert return_large_blocks() is False
        pytest.skip("not glibc")
    assert return_large_blocks() is True
    left = {
        call: int(
            subprocess.run([sys.executable, "-c", CODE.format(call=call)], capture_output=True, check=True).stdout
        )
        for call in ("pass", "return_large_blocks()")
    }
    assert left["return_large_blocks()"] < 10_000_000 < left["pass"]
