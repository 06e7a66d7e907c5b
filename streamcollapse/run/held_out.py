"""Text that no search has seen, and how well a model and plans of it predict it, in one walk over its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from streamcollapse.errors import CalibrationError, NonFiniteError, printable
from streamcollapse.forward.batches import call_tokens
from streamcollapse.forward.model import StreamedModel, overflow
from streamcollapse.forward.perplexity import Perplexity, Window, make_windows, streamed_perplexities
from streamcollapse.forward.walk import Stack, schedule
from streamcollapse.merge.plan import Plan, original_layers
from streamcollapse.progress import PhaseStarted
from streamcollapse.resources.device import heap_for
from streamcollapse.run.memory_plan import plan_one_layer
from streamcollapse.run.opened import Job, open_stream
from streamcollapse.run.samples import check_vocabulary, load_tokenizer, longest_context, opening_tokens
from streamcollapse.run.text_names import read_text
from streamcollapse.settings.run import Streaming

SHIPPED = "encyclopedia, shipped"
_SHIPPED_CHARACTERS = 90_000  # of the file; the passages that searches calibrate on come after them
_LONGEST_WINDOW = 512
_MOST_CHARACTERS = 1 << 20  # that are tokenised


@dataclass(frozen=True)
class HeldOut:
    """A text as ``windows`` of token ids, spread evenly over it. ``name``: as records say it."""

    name: str
    windows: list[Window]

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(len(window.token_ids) for window in self.windows)

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max(len(window.token_ids) for window in self.windows)


def shipped_text() -> str:
    """The text that comes with the package: paragraphs of an encyclopedia, disjoint from the calibration samples."""
    file = resources.files("streamcollapse.data") / "text" / "wiki_eval.txt"
    text = file.read_text(encoding="utf-8")[:_SHIPPED_CHARACTERS]
    return text[: text.rindex("\n")]


def unjudged_text() -> str:
    """The rest of the file: what nothing is judged by."""
    file = resources.files("streamcollapse.data") / "text" / "wiki_eval.txt"
    text = file.read_text(encoding="utf-8")[_SHIPPED_CHARACTERS:]
    return text[text.index("\n") + 1 :]


def held_out_tokens(vocabulary: int) -> int:
    """How many tokens are enough to tell plans apart: fewer where the logits of each cost much."""
    return min(2048, max(1024, (1 << 28) // vocabulary))


def held_out_text(job: Job, file: str | Path | None = None, max_tokens: int | None = None) -> HeldOut:
    """About ``max_tokens`` tokens (None: as many as are enough) of the UTF-8 ``file``, or of the text that comes with
    the package, as the tokenizer of ``job`` has them. Raises CalibrationError."""
    text = shipped_text() if file is None else read_text(Path(file))
    tokenizer = load_tokenizer(job.checkpoint.directory, job.trust_remote_code)
    token_ids = list(tokenizer(text[:_MOST_CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"])
    check_vocabulary(token_ids, job.vocabulary)
    tokens = max_tokens or held_out_tokens(job.vocabulary)
    # no larger than a call of a search on a CPU, whose memory is planned: the same on every device
    longest = min(longest_context(job) or _LONGEST_WINDOW, _LONGEST_WINDOW, call_tokens(job.width), max(tokens, 2))
    windows = make_windows(opening_tokens(tokenizer), token_ids, longest)
    if not windows:
        raise CalibrationError(f"{file}: the text has no token to predict; give a longer text")
    count = min(max(tokens // longest, 1), len(windows))
    chosen = [windows[n * len(windows) // count] for n in range(count)]
    return HeldOut(SHIPPED if file is None else printable(Path(file).name), chosen)


def plans_on(model: StreamedModel, text: HeldOut, plans: Sequence[Plan], job: Job) -> list[Perplexity]:
    """Perplexity on ``text`` of the source of ``job`` and of each of ``plans`` of it, in this order, by ``model``; that
    of a plan whose values overflow the compute dtype is infinite. Calls are no larger than those of a search, or a
    window. Raises CalibrationError, NonFiniteError."""
    stacks = [original_layers(job.num_layers), *(plan.layers for plan in plans)]
    norms = [False, *(plan.merge_norms for plan in plans)]
    before, *after = streamed_perplexities(model, stacks, norms, text.windows, job.vocabulary, job.call_tokens)
    if before.nll == float("inf"):
        raise NonFiniteError(overflow("the logits", model.placement.dtype_name))
    return [before, *after]


def held_out_perplexities(job: Job, text: HeldOut, plans: Sequence[Plan], streaming: Streaming) -> list[Perplexity]:
    """``plans_on`` with a weight stream of its own, as the phase ``held out``: for where no run is under way."""
    memory = plan_one_layer(job, streaming, max(job.call_tokens, text.longest))
    with open_stream(job, memory) as stream, job.meter.phase("held out"), heap_for(memory.activations):
        stacks = [Stack(layers, 0) for layers in (original_layers(job.num_layers), *(plan.layers for plan in plans))]
        job.listener(PhaseStarted("held out", len(schedule(stacks))))
        return plans_on(job.model(stream), text, plans, job)
