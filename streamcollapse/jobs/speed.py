"""Memory and generation speed of a checkpoint, loaded the ordinary way: the paper's Table 5, for any model."""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from streamcollapse.arch.config import THEIR_ERRORS, first_line
from streamcollapse.errors import BudgetError, ModelError, OptionError
from streamcollapse.resources.budget import free_ram
from streamcollapse.resources.device import free_vram
from streamcollapse.resources.meter import MemorySampler, sample_memory
from streamcollapse.resources.processes import fresh_processes
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import RunSettings
from streamcollapse.units import format_bytes

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Speed:
    """``tokens_per_second`` is the median of ``runs``, greedy with a cache, after ``PROMPT_TOKENS`` tokens of prompt;
    ``memory`` the most bytes that loading and generating took: of the device, or of the process beyond its own before.
    """

    path: str
    layers: int
    weights: int
    memory: int
    tokens_per_second: float
    runs: list[float]
    new_tokens: int
    device: str
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return asdict(self)


def speed(
    directory: str | Path,
    *,
    new_tokens: int = 64,
    repeat: int = 3,
    settings: RunSettings = RunSettings(),  # noqa: B008 - frozen
    own_process: bool = False,
) -> Speed:
    """Load ``directory`` with transformers and generate ``new_tokens`` tokens ``repeat`` times, after one unmeasured
    run; in its ``own_process``, so that the memory of one model is not counted towards another's.

    Raises BudgetError where the model does not fit into memory as a whole, StreamCollapseError for anything else.
    """
    for name, value in (("new tokens", new_tokens), ("repeat", repeat)):
        if value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1")
    if own_process:
        with ProcessPoolExecutor(1, fresh_processes(__name__)) as pool:
            return pool.submit(speed, directory, new_tokens=new_tokens, repeat=repeat, settings=settings).result()
    job = open_job(directory, settings)
    device, dtype = job.placement.device, job.placement.dtype
    needed = job.checkpoint.num_parameters * dtype.itemsize
    free = free_ram() if device.type == "cpu" else free_vram(device)
    if needed > free:
        raise BudgetError(
            f"the model takes {format_bytes(needed)} as a whole and {format_bytes(free)} are free; "
            "generation is measured on a model that fits"
        )
    before = sample_memory().rss
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with MemorySampler(device, lambda moment, sample: None) as sampler:
        model = _load(job.checkpoint.directory, dtype, device, settings.trust_remote_code)
        prompt = torch.arange(PROMPT_TOKENS, device=device).remainder(job.vocabulary - 2).add(2)[None]
        runs = [_run(model, prompt, new_tokens) for _ in range(repeat + 1)][1:]
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else sampler.peak.rss - before
    rates = [new_tokens / seconds for seconds in runs]
    return Speed(
        path=str(job.checkpoint.directory),
        layers=job.num_layers,
        weights=job.checkpoint.num_bytes,
        memory=memory,
        tokens_per_second=statistics.median(rates),
        runs=rates,
        new_tokens=new_tokens,
        device=str(device),
        dtype=job.placement.dtype_name,
    )


def _load(directory: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    except THEIR_ERRORS as error:
        raise ModelError(f"the model cannot be loaded: {first_line(error)}") from error
    return model.to(device).eval()


@torch.inference_mode()
def _run(model: Any, prompt: torch.Tensor, new_tokens: int) -> float:
    start = time.perf_counter()
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    if prompt.is_cuda:
        torch.cuda.synchronize(prompt.device)
    return time.perf_counter() - start
