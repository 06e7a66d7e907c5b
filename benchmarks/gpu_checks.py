"""Rows of gpu_day.py on what must be true on a GPU: its tests pass, and it decides and mixes as a CPU does."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as Tree
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench
from gpu_rows import Finding
from gpu_runs import compared, searched

from streamcollapse.merge.mixing import mix_tensors
from streamcollapse.settings.run import Compute, RunSettings
from streamcollapse.settings.search import SearchOptions

ROOT = Path(__file__).resolve().parents[1]
MARK = "pytest.mark.gpu"
COEFFICIENTS = {"the mean of 3": [1 / 3] * 3, "rdsc": [-2.0, 1.0, 1.0, 1.0], "1.1": [1.1]}
DTYPES = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}  # and what shows their bits


def tests(bench: Bench) -> Finding:
    """The tests marked ``gpu``, wherever they are."""
    files = sorted(str(p) for p in (ROOT / "tests").rglob("test_*.py") if MARK in p.read_text("utf-8"))
    report = bench.place / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
    if not report.exists():
        raise RuntimeError(f"pytest made no report, exit code {done.returncode}\n{end}")
    suites = list(Tree.parse(report).getroot().iter("testsuite"))
    count = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    words = f"{passed} passed, {failed} failed, {count['skipped']} skipped, in {len(files)} files"
    good = done.returncode == 0 and (bench.rehearsal or (passed > 0 and not count["skipped"]))
    return Finding(words, {**count, "passed": passed}, holds=good, output="" if good else end)


def decisions(bench: Bench, options: dict[str, Any]) -> Finding:
    """One search on the CPU and one on the device, in float32, of the model that ships with the package."""
    with resources.as_file(resources.files("streamcollapse.data") / "wiki-llama-24l") as source:
        wanted = SearchOptions(**options, lowest=bench.pick(1, 12), target_layers=bench.pick(20, 21))
        plans = [
            searched(source, wanted, RunSettings(Compute(device, "float32"), bench.calibration("sentences"))).plan
            for device in ("cpu", bench.device.name)
        ]
    found = compared(*plans)
    figures = {"same_layers": found.same, "largest_difference": found.apart}
    return Finding(found.words, {**figures, "plans": [plan.to_json() for plan in plans]}, holds=found.same)


def mixing(bench: Bench) -> Finding:
    """Mixed tensors of both devices, bit by bit."""
    size, generator = bench.pick(1 << 25, 1 << 16), torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator) * 0.02 for _ in range(4)]
    shares: dict[str, float] = {}
    for dtype_name, bits in DTYPES.items():
        dtype: torch.dtype = getattr(torch, dtype_name)
        stored = [part.to(dtype) for part in parts]
        for what, coefficients in COEFFICIENTS.items():
            terms = list(zip(coefficients, stored, strict=False))
            there = [(c, part.to(bench.device.place)) for c, part in terms]
            one, other = mix_tensors(terms, dtype), mix_tensors(there, dtype).cpu()
            differing = one.view(bits) != other.view(bits)
            shares[f"{dtype_name}, {what}"] = float(differing.sum()) / size
    different = {name: share for name, share in shares.items() if share}
    words = ", ".join(f"{name}: {share:.2g} of all" for name, share in different.items())
    counted = f"{len(shares)} kinds of {size} elements"
    return Finding(f"{words or 'none differs'} ({counted})", {"elements": size, "shares": shares}, holds=not different)
