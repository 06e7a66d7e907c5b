"""Text that repairs are fitted to, cut into windows, and a part of it kept apart to judge them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from streamcollapse.errors import CalibrationError, printable
from streamcollapse.forward.batches import Batch, call_tokens, make_batches, one_in, step_batches
from streamcollapse.forward.perplexity import Window, make_windows
from streamcollapse.run.held_out import unjudged_text
from streamcollapse.run.opened import Job
from streamcollapse.run.samples import check_vocabulary, load_tokenizer, longest_context, opening_tokens, samples_digest
from streamcollapse.run.text_names import short
from streamcollapse.run.texts import documents
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.run import Repair

SHIPPED = "encyclopedia, code and documentation, shipped"
_LONGEST_WINDOW = 512
_STEP_TOKENS = 2048  # of what is trained end to end
_HELD_OUT = 6  # one window in so many
_MOST_CHARACTERS = 1 << 24  # that are tokenised


@dataclass(frozen=True)
class FitText:
    """``name``: as records say it. Windows of token ids: those to ``fit`` on, as many a step as ``a_step`` says, and
    those ``held_out`` from it."""

    name: str
    fit: list[list[int]]
    held_out: list[list[int]]
    a_step: int
    call_tokens: int

    @property
    def digest(self) -> str:
        """sha256 of the token ids."""
        return samples_digest([*self.fit, *self.held_out])

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens are fitted to, and held out."""
        return sum(map(len, self.fit)), sum(map(len, self.held_out))

    def every(self, vocabulary: int) -> int:
        """One in how many tokens of a step next-token distributions of ``vocabulary`` are compared at: as few as the
        default search compares."""
        return one_in([[len(ids) - 1 for ids in self.fit[: self.a_step]]], EFFORTS["standard"].head_tokens(vocabulary))

    @property
    def batches(self) -> tuple[list[Batch], list[Batch]]:
        """Both parts as calls of a layer take them."""
        return step_batches(self.fit, self.a_step, self.call_tokens)[0], make_batches(self.held_out, self.call_tokens)

    @property
    def windows(self) -> list[Window]:
        """The held-out part, to be predicted."""
        return [Window(ids, len(ids) - 1) for ids in self.held_out if len(ids) > 1]


def fit_text(job: Job, settings: Repair) -> FitText:
    """About ``settings.tokens`` tokens of its file, or of the texts that ship, spread evenly over each of them. Raises
    CalibrationError."""
    tokenizer = load_tokenizer(job.checkpoint.directory, job.trust_remote_code)
    texts = shipped_documents() if settings.file is None else ["\n\n".join(documents(settings.file, tokenizer))]
    name = SHIPPED if settings.file is None else printable(short(settings.file))
    longest = min(longest_context(job) or _LONGEST_WINDOW, _LONGEST_WINDOW, call_tokens(job.width))
    windows: list[list[int]] = []
    for text in texts:
        ids = list(tokenizer(text[:_MOST_CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"])
        check_vocabulary(ids, job.vocabulary)
        windows += [window.token_ids for window in make_windows(opening_tokens(tokenizer), ids, longest)]
    whole = [ids for ids in windows if len(ids) == longest] or windows
    count = min(max(settings.tokens // longest, 2), len(whole))
    if len(whole) < 2:
        raise CalibrationError(f"{name}: too short for a repair, which needs two windows of {longest} tokens at least")
    chosen = [whole[n * len(whole) // count] for n in range(count)]
    calls = min(job.call_tokens, _STEP_TOKENS)
    held_out = chosen[_HELD_OUT // 2 :: _HELD_OUT] or chosen[-1:]
    fit = [ids for n, ids in enumerate(chosen) if not any(ids is one for one in held_out)]
    return FitText(name, fit, held_out, max(_STEP_TOKENS // longest, 1), calls)


def shipped_documents() -> Sequence[str]:
    """The texts that ship to be learned from, by kind: what the encyclopedia has after the text that judges, code, and
    documentation."""
    file = resources.files("streamcollapse.data") / "text" / "code_and_documentation.jsonl"
    shipped = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    kinds = dict.fromkeys(record["kind"] for record in shipped)
    return [unjudged_text(), *("\n\n".join(r["text"] for r in shipped if r["kind"] == kind) for kind in kinds)]
