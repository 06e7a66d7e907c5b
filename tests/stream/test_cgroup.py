"""A real memory cgroup: what it has left is what counts as free."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT = 700 << 20
CODE = """
import os, sys
with open(sys.argv[1], "w") as tasks:
    tasks.write(str(os.getpid()))
from streamcollapse.resources.budget import free_ram, group_usage
print(free_ram(), group_usage())
"""


@pytest.fixture
def group() -> Iterator[Path]:
    path = Path(f"/sys/fs/cgroup/memory/streamcollapse-test-{os.getpid()}")
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"a version 1 memory cgroup cannot be made here: {error.strerror}")
    yield path
    path.rmdir()


def test_what_the_group_has_left_is_what_is_free(group: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(group / "tasks")], capture_output=True, text=True, check=True
    )
    free, used = map(int, done.stdout.split())
    assert 0 < used < LIMIT
    assert LIMIT - used <= free < LIMIT, "file pages of the group can be dropped"
