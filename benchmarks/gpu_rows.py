"""The rows of gpu_day.py: what each asks, what is wanted, how long it may take. Knows nothing of torch.

A row is a function ``module:name`` that takes a ``Bench`` (gpu_bench.py) and the row's own settings and returns a
``Finding``. Rows of a part run in this order, each in a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PARTS = (1, 2, 3, 4)
RING_WANTED = 1.15  # as bench_engine.py wants it of a pass
OF_CEILING = 0.8
SEARCH_SECONDS = 2.0
PAPER_SECONDS = 14.7  # LaCo on Llama2-7B, the whole pruning, on an A100 (the paper)
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """What a row has measured, in words and as figures of JSON types.

    ``holds``: whether what has to be true is; ``fast``: whether it was as fast as wanted, which a rehearsal does not
    judge. None: nothing was wanted. ``output``: what a program said that shows why something does not hold.
    """

    measured: str
    figures: dict[str, Any]
    holds: bool | None = None
    fast: bool | None = None
    output: str = ""


@dataclass(frozen=True)
class Row:
    """One row: ``call`` with the settings ``given``, in one of ``parts``, for at most ``limit`` seconds, after the rows
    that it ``needs`` have been measured."""

    name: str
    parts: tuple[int, ...]
    question: str
    call: str
    limit: float
    wanted: str = ""
    needs: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)


ABOUT = Row("about", (), "What machine is this?", "gpu_bench:about", 150)  # the first imports are its own

_ONE = (
    Row("tests", (1,), "Do the tests that need a GPU pass?", "gpu_checks:tests", 240, "none fails, none is skipped"),
    Row("bus", (1,), "How fast is memory copied to the device, and pinned?", "gpu_bus:bus", 60),
    Row("mixing", (1,), "Do both devices mix tensors to the same bits?", "gpu_checks:mixing", 60, "0 elements differ"),
    Row("make-7b", (1, 2, 4), "The 7B, dense", "gpu_jobs:make", 120, given={"shape": "llama2-7b"}),
    Row(
        "laco-7b",
        (1,),
        "laco by default on ten sentences, 7B, resident: how long?",
        "gpu_jobs:laco",
        90,
        f"search under {SEARCH_SECONDS:g} s",
        ("make-7b",),
        {"shape": "llama2-7b", "most_seconds": SEARCH_SECONDS},
    ),
    Row(
        "ring",
        (1,),
        "A pass that computes nothing: its time over max(reading, copying) alone",
        "gpu_bus:ring",
        90,
        f"at most {RING_WANTED} as shipped",
        ("make-7b",),
        {"shape": "llama2-7b", "in_flight": (4, 8, 16)},
    ),
    Row(
        "overlap",
        (1,),
        "A pass with as much computing: its time over max(each alone)",
        "gpu_bus:overlap",
        60,
        f"at most {RING_WANTED}",
        ("make-7b",),
        {"shape": "llama2-7b"},
    ),
    Row("make-1.1b", (1,), "The 1.1B, dense", "gpu_jobs:make", 40, given={"shape": "tinyllama-1.1b"}),
    Row(
        "laco-1.1b",
        (1,),
        "laco by default on ten sentences, 1.1B, resident: how long?",
        "gpu_jobs:laco",
        40,
        needs=("make-1.1b",),
        given={"shape": "tinyllama-1.1b"},
    ),
    Row(
        "default-1.1b",
        (1,),
        "The default prune to a quarter less, 1.1B: how long?",
        "gpu_jobs:default",
        120,
        needs=("make-1.1b",),
        given={"shape": "tinyllama-1.1b", "ratio": 0.25},
    ),
    *(
        Row(
            f"decide-{name}",
            (1,),
            f"Do both devices decide the same in float32: {words}?",
            "gpu_checks:decisions",
            45,
            "the same layers",
            given={"options": options},
        )
        for name, words, options in (
            ("sequential", "laco, sequential", {"strategy": "laco", "rule": "sequential"}),
            ("mean", "laco, mean", {"strategy": "laco", "rule": "mean"}),
            ("rdsc", "laco, rdsc", {"strategy": "laco", "rule": "rdsc"}),
            ("best", "laco, best", {"strategy": "laco", "rule": "best"}),
            ("greedy", "greedy, kl", {"strategy": "greedy", "metric": "kl", "rescale": False}),
            ("scales", "greedy, kl, with scales", {"strategy": "greedy", "metric": "kl", "rescale": True}),
        )
    ),
    Row(
        "default-7b",
        (1,),
        "The default search, 7B: two rounds and the scales: how long?",
        "gpu_jobs:default",
        200,
        needs=("make-7b",),
        given={"shape": "llama2-7b", "fewer": 2},
    ),
)

_TWO = (
    Row(
        "make-13b",
        (2,),
        "The 13B, sparse: holes that read as zeros",
        "gpu_jobs:make",
        60,
        given={"shape": "llama2-13b", "sparse": True},
    ),
    Row(
        "pass-13b",
        (2,),
        "A reference pass over the 13B, nothing resident: its rate over the ceiling",
        "gpu_streamed:streamed_pass",
        120,
        f"at least {OF_CEILING} of min(reading, copying) alone",
        ("make-13b",),
        {"shape": "llama2-13b", "vram": 8 * GIB},
    ),
    Row(
        "whole-7b",
        (2,),
        "The 7B prune without a budget: its plan",
        "gpu_streamed:whole",
        90,
        needs=("make-7b",),
        given={"shape": "llama2-7b"},
    ),
    Row(
        "budget-7b",
        (2,),
        "The 7B prune within 6 GiB of GPU memory",
        "gpu_streamed:within",
        120,
        "reserved at most 6 GiB, the same plan to the bit",
        ("whole-7b",),
        {"shape": "llama2-7b", "vram": 6 * GIB},
    ),
    Row(
        "refused-laco-7b",
        (2,),
        "laco with 1.5 GiB for the 7B: is it refused, and does the least named do?",
        "gpu_streamed:refused",
        120,
        "refused before a weight is read; reserved within the least named",
        ("make-7b",),
        {"shape": "llama2-7b", "vram": 3 * GIB // 2, "options": {"strategy": "laco"}},
    ),
    Row(
        "beside-7b",
        (2,),
        "The 7B prune by default while another process holds all but 8 GiB",
        "gpu_streamed:beside",
        120,
        "the same plan to the bit",
        ("whole-7b",),
        {"shape": "llama2-7b", "left": 8 * GIB},
    ),
    Row(
        "refused-default-7b",
        (2,),
        "The default search with 2 GiB for the 7B: the same, for one round",
        "gpu_streamed:refused",
        150,
        "refused before a weight is read; reserved within the least named",
        ("make-7b",),
        {"shape": "llama2-7b", "vram": 2 * GIB, "options": {"strategy": "greedy", "rescale": False}, "fewer": 1},
    ),
)

_SEVENTY = {"shape": "llama2-70b", "vram": 20 * GIB, "ram": 32 * GIB}
_KEEPS = "reserved at most 20 GiB, at most 32 GiB of memory"
_THREE = (
    Row(
        "make-70b",
        (3, 4),
        "The 70B, sparse: holes that read as zeros",
        "gpu_jobs:make",
        60,
        given={"shape": "llama2-70b", "sparse": True},
    ),
    Row(
        "accepts-70b",
        (3,),
        "laco on the 70B, ten sentences, every merge accepted (T = -1)",
        "gpu_streamed:seventy",
        120,
        _KEEPS,
        ("make-70b",),
        {**_SEVENTY, "options": {"strategy": "laco", "threshold": -1.0}},
    ),
    Row(
        "rejects-70b",
        (3,),
        "laco on the 70B, ten sentences, every merge rejected (T = 1)",
        "gpu_streamed:seventy",
        160,
        _KEEPS,
        ("make-70b",),
        {**_SEVENTY, "options": {"strategy": "laco", "threshold": 1.0}},
    ),
    Row(
        "default-70b",
        (3,),
        "The default search on the 70B, 24 passages, two rounds without scales",
        "gpu_streamed:seventy",
        420,
        _KEEPS,
        ("make-70b",),
        {**_SEVENTY, "options": {"strategy": "greedy", "rescale": False}, "fewer": 2},
    ),
)

_FOUR = (
    Row(
        "repair-7b",
        (4,),
        "--repair auto, 7B without a quarter of its layers, on 32,000 tokens: how long?",
        "gpu_mending:repair",
        180,
        needs=("make-7b",),
        given={"shape": "llama2-7b", "tokens": 32_000},
    ),
    *(
        Row(
            name,
            (4,),
            f"Healing the same with adapters, {words}: how fast?",
            "gpu_mending:heal",
            120,
            wanted,
            ("make-7b",),
            {"shape": "llama2-7b", "steps": 6, "batch_tokens": 8192, "vram": vram},
        )
        for name, words, wanted, vram in (
            ("heal-7b", "all GPU memory", "", None),
            ("heal-7b-in-8gib", "8 GiB of GPU memory", "reserved at most 8 GiB", 8 * GIB),
        )
    ),
    Row(
        "heal-70b",
        (4,),
        "Healing the 70B with adapters, one GPU of 80 GB, 128 GiB of memory: how fast?",
        "gpu_mending:heal",
        240,
        "reserved at most 72 GiB, at most 112 GiB of memory",
        ("make-70b",),
        {"shape": "llama2-70b", "steps": 2, "batch_tokens": 8192, "vram": 72 * GIB, "ram": 112 * GIB},
    ),
)

# What can go wrong, to be called by name alone: they show that a part goes on.
_DRILLS = (
    Row("fails", (), "A row that fails", "gpu_rows:fails", 30),
    Row("sleeps", (), "A row that does not end", "gpu_rows:sleeps", 3),
    Row("crashes", (), "A row whose process dies", "gpu_rows:crashes", 30),
    Row("misses", (), "A row that misses what is wanted", "gpu_rows:misses", 30, "true"),
    Row("waits", (), "A row that needs one that failed", "gpu_rows:misses", 30, needs=("fails",)),
    Row("waits-for-killed", (), "A row that needs one that was killed", "gpu_rows:misses", 30, needs=("sleeps",)),
)

ROWS = (*_ONE, *_TWO, *_THREE, *_FOUR, *_DRILLS)


def fails(bench: Any) -> Finding:
    """Raise."""
    raise ValueError("a row made to fail")


def sleeps(bench: Any) -> Finding:
    """Never end, and have a child that does not either."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    bench.note(answer=42)
    bench.note(child=child.pid)
    time.sleep(600)
    raise AssertionError


def crashes(bench: Any) -> Finding:
    """Die as a program in C does."""
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def misses(bench: Any) -> Finding:
    """Measure what is not as wanted."""
    return Finding("false", {}, holds=False)
