"""Perplexity of a checkpoint on a text, with weights streamed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcollapse.errors import OptionError
from streamcollapse.forward.perplexity import make_windows, streamed_perplexity
from streamcollapse.jobs.opening import longest_context, open_job
from streamcollapse.jobs.streams import open_stream, plain_allotment
from streamcollapse.progress import Listener, PhaseStarted, silent
from streamcollapse.settings import Compute, Streaming
from streamcollapse.strategy.calibration import check_vocabulary, load_tokenizer, opening_tokens, read_text

LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class Score:
    """``perplexity`` = exp(``nll``), the mean over ``tokens`` predicted tokens, in windows of ``window`` tokens."""

    perplexity: float
    nll: float
    tokens: int
    window: int
    usage: dict[str, Any]


def perplexity(
    source: str | Path,
    text: str | Path,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    compute: Compute = Compute(),  # noqa: B008
    streaming: Streaming = Streaming(),  # noqa: B008
    trust_remote_code: bool = False,
    listener: Listener = silent,
) -> Score:
    """Perplexity of the checkpoint ``source`` on the UTF-8 file ``text``, cut to its first ``max_tokens`` tokens.

    The text is cut into neighbouring windows of ``window`` tokens (default: the model's context, at most 2048), each
    opened by the tokens that the tokenizer puts first; every other token is predicted once. Raises StreamCollapseError.
    """
    for name, value in (("window", window), ("max tokens", max_tokens)):
        if value is not None and value < 2:
            raise OptionError(f"{name} is {value}; it must be at least 2")
    contents = read_text(Path(text))
    job = open_job(source, compute, trust_remote_code, listener)
    context = longest_context(job)
    if window is None:
        window = min(context or LONGEST_WINDOW, LONGEST_WINDOW)
    elif context is not None and window > context:
        raise OptionError(f"window is {window}, but the model takes {context} tokens at most")
    tokenizer = load_tokenizer(job.checkpoint.directory, trust_remote_code)
    token_ids = list(tokenizer(contents, add_special_tokens=False, verbose=False)["input_ids"])[:max_tokens]
    check_vocabulary(token_ids, job.vocabulary)
    windows = make_windows(opening_tokens(tokenizer), token_ids, window)
    stream = open_stream(job, plain_allotment(job, streaming))
    with job.meter.phase("perplexity"):
        listener(PhaseStarted("perplexity", job.num_layers))
        result = streamed_perplexity(
            job.model(), stream, job.architecture.layout, windows, job.hidden_size, job.vocabulary, job.meter, listener
        )
    return Score(result.perplexity, result.nll, result.tokens, window, job.meter.summary())
