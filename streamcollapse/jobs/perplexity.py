"""Perplexity of a checkpoint on a text, with weights streamed."""

import math
from dataclasses import dataclass
from pathlib import Path

from streamcollapse.errors import OptionError
from streamcollapse.forward.batches import MOST_CALL_TOKENS
from streamcollapse.forward.perplexity import make_windows, streamed_perplexity
from streamcollapse.merge.plan import Plan, original_layers
from streamcollapse.progress import Listener, PhaseStarted, silent
from streamcollapse.resources.device import heap_for
from streamcollapse.resources.meter import Usage
from streamcollapse.run.memory_plan import plan_one_layer
from streamcollapse.run.opened import open_job, open_stream
from streamcollapse.run.refits import use_plan
from streamcollapse.run.samples import check_vocabulary, load_tokenizer, longest_context, opening_tokens
from streamcollapse.run.text_names import read_text
from streamcollapse.settings.run import EvaluationText, RunSettings

LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class Score:
    """``perplexity`` = exp(``nll``), the mean over ``tokens`` predicted tokens, in windows of ``window`` tokens, each
    ``stride`` tokens of text after the one before. ``bits_per_byte``: the same loss over the UTF-8 bytes of the text,
    which can be compared between tokenizers."""

    perplexity: float
    nll: float
    bits_per_byte: float
    tokens: int
    window: int
    stride: int
    layers: int
    usage: Usage


def perplexity(
    source: str | Path,
    text: str | Path | EvaluationText,
    *,
    plan: Plan | None = None,
    settings: RunSettings = RunSettings(),  # noqa: B008 - frozen
    listener: Listener = silent,
) -> Score:
    """Perplexity of the checkpoint ``source`` on the UTF-8 file ``text``; with ``plan`` that of the pruned model that
    it describes, which is not written.

    The text is cut into windows (EvaluationText), each opened by the tokens that the tokenizer puts first; every token
    is predicted once, by the first window that has it. Raises StreamCollapseError.
    """
    asked = text if isinstance(text, EvaluationText) else EvaluationText(text)
    contents = read_text(Path(asked.file))
    job = open_job(source, settings, listener)
    if plan is not None:
        use_plan(job, plan)
    layers = original_layers(job.num_layers) if plan is None else plan.layers
    merge_norms = plan is not None and plan.merge_norms
    window = _window(asked.window, longest_context(job))
    tokenizer = load_tokenizer(job.checkpoint.directory, settings.trust_remote_code)
    whole = list(tokenizer(contents, add_special_tokens=False, verbose=False)["input_ids"])
    token_ids = whole[: asked.max_tokens]
    check_vocabulary(token_ids, job.vocabulary)
    prefix = opening_tokens(tokenizer)
    windows = make_windows(prefix, token_ids, window, asked.stride)
    scored = contents if len(token_ids) == len(whole) else tokenizer.decode(token_ids)
    calls = max(job.call_tokens, MOST_CALL_TOKENS)
    choice = plan_one_layer(job, settings.streaming, calls)
    with open_stream(job, choice) as stream, job.meter.phase("perplexity"), heap_for(choice.activations):
        listener(PhaseStarted("perplexity", len(layers)))
        result = streamed_perplexity(job.model(stream), layers, merge_norms, windows, job.vocabulary, calls)
    bits = result.nll * result.tokens / math.log(2) / max(len(scored.encode()), 1)
    step = asked.stride or window - len(prefix)
    usage = job.meter.summary()
    return Score(result.perplexity, result.nll, bits, result.tokens, window, step, len(layers), usage)


def _window(asked: int | None, context: int | None) -> int:
    """Tokens per window for a model that takes ``context`` at most. Raises OptionError."""
    if asked is None:
        return min(context or LONGEST_WINDOW, LONGEST_WINDOW)
    if context is not None and asked > context:
        raise OptionError(f"window is {asked}, but the model takes {context} tokens at most")
    return asked
