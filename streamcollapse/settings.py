"""What a user may set besides the method: checked on construction, each default written here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from streamcollapse.errors import OptionError
from streamcollapse.units import parse_bytes

# the calibration samples that ship with the package: ten sentences, and 24 passages of about 256 tokens
SAMPLES = ("sentences", "passages")
IO_MODES = ("auto", "mmap", "pread", "direct")
MOST_PREFETCH = 64
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Compute:
    """Where the forward pass runs: ``device`` auto, cpu or cuda[:n]; ``dtype`` auto, float32, bfloat16 or float16.

    ``auto`` takes the first CUDA device if there is one, and computes in the checkpoint's dtype there. On a CPU it
    computes in bfloat16 where the checkpoint is stored so and the processor multiplies it natively, else in float32.
    """

    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise OptionError(f"device {self.device!r} is unknown; choose auto, cpu, cuda or cuda:N")
        if self.dtype not in ("auto", *COMPUTE_DTYPES):
            raise OptionError(f"compute dtype {self.dtype!r} is unknown; choose auto, {', '.join(COMPUTE_DTYPES)}")


@dataclass(frozen=True)
class Calibration:
    """Which samples to calibrate on: ``file`` (.txt with a sample a line, .jsonl with ``text``, one of SAMPLES, or None
    for those of SAMPLES that suit the strategy), each cut to ``max_tokens`` tokens, special tokens included."""

    file: str | Path | None = None
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise OptionError(f"max tokens is {self.max_tokens}; a sample needs at least 1 token")


@dataclass(frozen=True)
class Streaming:
    """How weights are streamed; no setting here changes a result.

    ``lookahead``: how many candidates one sweep evaluates at most; None weighs measured reading time against measured
    computing time. ``prefetch``: how many layers are read ahead of the computation. ``io``: how they are read: mmap (in
    place), pread (through the page cache), direct (past it); auto measures. ``ram_budget``, ``vram_budget``: sizes such
    as ``8GiB`` that the run stays within, beyond what the interpreter takes; None for what is free, less a margin.
    ``work_dir``: where evaluated candidates and hidden states are kept for another search; None for nowhere.
    """

    lookahead: int | None = None
    prefetch: int = 2
    io: str = "auto"
    ram_budget: str | int | None = None
    vram_budget: str | int | None = None
    work_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if self.lookahead is not None and self.lookahead < 1:
            raise OptionError(f"lookahead is {self.lookahead}; a sweep evaluates at least 1 candidate")
        if not 0 <= self.prefetch <= MOST_PREFETCH:
            raise OptionError(f"prefetch is {self.prefetch}; from 0 to {MOST_PREFETCH} layers can be read ahead")
        if self.io not in IO_MODES:
            raise OptionError(f"I/O mode {self.io!r} is unknown; choose one of {', '.join(IO_MODES)}")
        for size in (self.ram_budget, self.vram_budget):
            if size is not None:
                parse_bytes(size)

    @staticmethod
    def parse_lookahead(text: str) -> int | None:
        """From text: ``auto`` or a number. Raises OptionError."""
        if text == "auto":
            return None
        if not re.fullmatch(r"-?\d{1,9}", text):
            raise OptionError(f"lookahead {text!r} is neither auto nor a number")
        return int(text)


@dataclass(frozen=True)
class Output:
    """How a checkpoint is written: ``max_shard_size`` such as ``5GB``; ``overwrite`` replaces an older directory."""

    max_shard_size: str | int = "5GB"
    overwrite: bool = False

    def __post_init__(self) -> None:
        parse_bytes(self.max_shard_size)

    @property
    def max_shard_bytes(self) -> int:
        return parse_bytes(self.max_shard_size)
