"""Files that are computed with in place cannot be cut short meanwhile, where the system grants leases."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.locks import FileLease
from streamcollapse.stream.loaders import MappedLoader
from tests.checkpoints import save_llama
from tests.streams import granted, truncating

SIGBUS_TEST = """
import sys, subprocess, time
from pathlib import Path
from streamcollapse import SearchOptions, Compute, RunSettings, Streaming, prune
from streamcollapse.errors import StreamCollapseError
from streamcollapse.progress import LayerDone
source, shard = Path(sys.argv[1]), Path(sys.argv[1]) / "model.safetensors"
cutting = []
def listen(event):
    if isinstance(event, LayerDone) and not cutting:
        code = "import os, sys; os.truncate(sys.argv[1], 5000)"
        cutting.append(subprocess.Popen([sys.executable, "-c", code, shard]))
        time.sleep(1)
try:
    settings = RunSettings(Compute("cpu", "float32"), streaming=Streaming(io="mmap", prefetch=0))
    prune(source, sys.argv[2], settings=settings, listener=listen)
except StreamCollapseError as error:
    print(error)
cutting[0].wait()
print(shard.stat().st_size)
"""


def test_a_lease_holds_back_who_wants_to_cut_the_file_short(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10000))
    with closing(granted(path)) as lease:
        assert not lease.is_wanted_back()
        assert path.read_bytes() == bytes(10000), "readers are not held back"
        cutting = truncating(path, 10)
        deadline = time.monotonic() + 30
        while not lease.is_wanted_back() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lease.is_wanted_back()
        assert path.stat().st_size == 10000
    assert cutting.wait(30) == 0
    assert path.stat().st_size == 10
    assert lease._handle is None


def test_where_there_is_no_lease_nothing_changes(tmp_path: Path) -> None:
    (tmp_path / "written").touch()
    with (tmp_path / "written").open("wb"):
        for path in (tmp_path / "gone", tmp_path / "written"):
            with closing(FileLease(path)) as lease:
                assert lease._handle is None
                assert not lease.is_wanted_back()


def test_a_pass_stops_where_somebody_waits_to_write(tmp_path: Path) -> None:
    directory = save_llama(tmp_path / "m")
    path = directory / "model.safetensors"
    granted(path).close()
    loader, names = MappedLoader(Checkpoint(directory), False), list(Checkpoint(directory).names)
    loader.start(1, 0)
    loader.load(names[:3], own_memory=False)
    cutting = truncating(path, 100)
    with pytest.raises(CheckpointError, match="another program is about to change it"):
        for _ in range(3000):
            loader.load(names[3:5], own_memory=False)
            time.sleep(0.01)
    loader.finish()
    assert cutting.wait(30) == 0
    assert path.stat().st_size == 100, "nobody waits longer than a pass"


def test_what_stays_in_use_is_looked_at_again_in_the_next_pass(tmp_path: Path) -> None:
    directory = save_llama(tmp_path / "m")
    loader, names = MappedLoader(Checkpoint(directory), False), list(Checkpoint(directory).names)
    loader.start(1, 0)
    loader.load(names[:3], own_memory=True)
    loader.finish()
    loader.start(1, 0)
    loader.finish()
    os.truncate(directory / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="changed size"):
        loader.start(1, 0)
    loader.finish()


def test_a_run_whose_source_is_cut_short_ends_with_an_error_not_a_crash(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source")
    granted(source / "model.safetensors").close()
    command = [sys.executable, "-c", SIGBUS_TEST, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"
    said, size = done.stdout.splitlines()
    assert "model.safetensors: another program is about to change it" in said
    assert size == "5000"
    assert not (tmp_path / "out").exists()
