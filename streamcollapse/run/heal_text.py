"""Text that is healed on, packed into windows, and a part of it kept apart to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamcollapse.errors import CalibrationError, printable
from streamcollapse.forward.batches import Batch, call_tokens, make_batches, step_batches
from streamcollapse.forward.perplexity import make_windows
from streamcollapse.run.fit_text import SHIPPED, shipped_documents
from streamcollapse.run.opened import Job
from streamcollapse.run.samples import check_vocabulary, load_tokenizer, longest_context, opening_tokens, samples_digest
from streamcollapse.run.text_names import short
from streamcollapse.run.texts import documents
from streamcollapse.settings.heal import Healing

_HELD_OUT = 16  # one window in so many, but
_FEWEST, _MOST = 2, 32  # windows
_SEED = 32
_APART = "\n\n"  # documents


@dataclass(frozen=True)
class HealText:
    """``name``: as records say it. Windows of token ids: those to ``learn`` from, in the order of learning, as many a
    step as ``a_step`` says, and those ``held_out``."""

    name: str
    learn: list[list[int]]
    held_out: list[list[int]]
    a_step: int
    call_tokens: int

    @property
    def digest(self) -> str:
        """sha256 of the token ids, in order."""
        return samples_digest([*self.learn, *self.held_out])

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens are learned from, and held out."""
        return sum(map(len, self.learn)), sum(map(len, self.held_out))

    def calls(self) -> tuple[list[Batch], list[list[int]], list[int]]:
        """All text as calls of a layer take it, the numbers of the calls of each step, and of those held out."""
        batches, steps = step_batches(self.learn, self.a_step, self.call_tokens)
        held = make_batches(self.held_out, self.call_tokens)
        return [*batches, *held], steps, list(range(len(batches), len(batches) + len(held)))


def heal_text(job: Job, healing: Healing) -> HealText:
    """About ``healing.tokens`` tokens of its text, or of the texts that ship. Raises CalibrationError."""
    tokenizer = load_tokenizer(job.checkpoint.directory, job.trust_remote_code)
    given = None if healing.file is None else documents(healing.file, tokenizer)
    name = SHIPPED if healing.file is None else printable(short(healing.file))
    length = min(healing.length, longest_context(job) or healing.length)
    windows = [ids for ids in _packed(job, tokenizer, given or shipped_documents(), length) if len(ids) == length]
    wanted = max(healing.tokens // length, _FEWEST + 1)
    if len(windows) < _FEWEST + 1:
        raise CalibrationError(f"{name}: too short to heal on, which takes {_FEWEST + 1} windows of {length} tokens")
    count = min(wanted, len(windows))
    chosen = [windows[n * len(windows) // count] for n in range(count)]
    apart = min(max(count // _HELD_OUT, _FEWEST), _MOST)
    held_out = {(2 * n + 1) * count // (2 * apart) for n in range(apart)}
    learn = [ids for n, ids in enumerate(chosen) if n not in held_out]
    order = torch.randperm(len(learn), generator=torch.Generator().manual_seed(_SEED)).tolist()
    a_step = max(healing.batch_tokens // length, 1)
    calls = max(min(job.call_tokens, max(a_step * length, call_tokens(job.width))), length)
    return HealText(name, [learn[n] for n in order], [chosen[n] for n in sorted(held_out)], a_step, calls)


def _packed(job: Job, tokenizer: object, texts: Sequence[str], length: int) -> list[list[int]]:
    """Windows of ``length`` tokens over all documents, one after the other."""
    ids = list(tokenizer(_APART.join(texts), add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[operator]
    check_vocabulary(ids, job.vocabulary)
    return [window.token_ids for window in make_windows(opening_tokens(tokenizer), ids, length)]
