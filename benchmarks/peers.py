"""The programs that streamcollapse is measured against: what each needs, its environment, and its command line.

Each gets a virtual environment of its own with this interpreter's torch, so that all compute with the same kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BASELINES = Path(__file__).parent / "baselines"
OURS, APPLY, PASSES = "streamcollapse", "streamcollapse apply", "streamcollapse passes"
SETTINGS = {"layers_per_merge": 4, "interval": 2, "threshold": 0.65}


class PeerError(Exception):
    """A peer that cannot run here, with the reason."""


@dataclass(frozen=True)
class Peer:
    """``letter`` as in ``--peers``; ``requirements`` beside torch; ``own_transformers``: whatever it asks for."""

    letter: str
    script: str
    requirements: tuple[str, ...]
    own_transformers: bool


PEERS = {
    "authors": Peer("a", "authors_procedure.py", (), False),
    "accelerate": Peer("b", "accelerate_offload.py", ("accelerate",), False),
    "mergekit": Peer("c", "mergekit_write.py", ("mergekit",), True),
    "airllm": Peer("d", "airllm_pass.py", ("airllm",), True),
}


@dataclass(frozen=True)
class Bench:
    """What all runs share. ``scratch`` holds what they write."""

    source: Path
    scratch: Path
    calibration: Path
    dtype: str
    threads: int
    cold: bool = False
    limit: int | None = None  # bytes of the memory cgroup that every program runs in
    passes: int = 3  # of those programs that make passes and nothing else

    @property
    def out(self) -> Path:
        return self.scratch / "out"

    @property
    def plan(self) -> Path:
        return self.scratch / "plan.json"

    @property
    def split(self) -> Path:
        return self.scratch / "split"


def environment(bench: Bench, name: str) -> dict[str, str]:
    """The same threads, which sleep when they wait, for all; nothing is looked up on the network."""
    shared = {"OMP_NUM_THREADS": str(bench.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    inherited = {
        key: value for key, value in os.environ.items() if name in (OURS, APPLY, PASSES) or key != "PYTHONPATH"
    }
    return {**inherited, **shared}


def command(bench: Bench, name: str, python: Path) -> list[str]:
    """The command line of ``name``: ours or a peer."""
    source, out, calibration = str(bench.source), str(bench.out), ["--calibration", str(bench.calibration)]
    settings = [x for key, value in SETTINGS.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    if name == OURS:
        ours = [str(python), "-m", "streamcollapse", "prune", source, "--out", out, "--device", "cpu", "--json"]
        return [
            *ours,
            "--strategy",
            "laco",
            "--rule",
            "sequential",
            "--compute-dtype",
            bench.dtype,
            *calibration,
            *settings,
        ]
    if name == APPLY:
        ours = [str(python), "-m", "streamcollapse", "apply", source, str(bench.plan), "--out", out]
        return [*ours, "--device", "cpu", "--json"]
    shared = ["--threads", str(bench.threads)]
    dtype = ["--dtype", bench.dtype]
    cold = ["--cold"] if bench.cold else []
    passes = ["--passes", str(bench.passes), *cold]
    if name == PASSES:
        return [str(python), str(BASELINES.parent / "our_passes.py"), source, *calibration, *dtype, *passes, *shared]
    arguments = {
        "authors": [source, out, *calibration, *dtype, *settings],
        "accelerate": [source, *calibration, *dtype, *passes],
        "mergekit": [source, str(bench.plan), out],
        "airllm": [source, str(bench.split), *calibration, *dtype, *passes],
    }
    return [str(python), str(BASELINES / PEERS[name].script), *arguments[name], *shared]


def peer_python(name: str, environments: Path) -> Path:
    """The interpreter of the peer's own environment. Raises PeerError."""
    return python_with(PEERS[name].requirements, PEERS[name].own_transformers, environments / name)


def python_with(requirements: tuple[str, ...], own_transformers: bool, directory: Path) -> Path:
    """The interpreter of an environment with ``requirements`` in ``directory``, made where it is not there yet. Raises
    PeerError."""
    python = directory / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    complete = directory / "complete"
    if complete.exists():
        return python
    packages = [f"torch=={metadata.version('torch').split('+')[0]}", *requirements]
    if not own_transformers:
        packages.append(f"transformers=={metadata.version('transformers')}")
    print(f"making an environment in {directory.name}: {' '.join(packages)}", flush=True)
    for step in (
        [sys.executable, "-m", "venv", str(directory)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
    ):
        done = subprocess.run(step, capture_output=True, text=True, env=_without_path())
        if done.returncode != 0:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise PeerError(f"{' '.join(step[1:4])} failed: {' | '.join(said[-3:])}")
    complete.touch()
    return python


def _without_path() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
