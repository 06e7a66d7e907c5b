"""Logits by parts of the vocabulary against the whole, and what is done where a part is not a part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from streamcollapse.forward import head as module
from streamcollapse.forward.batches import make_batches
from streamcollapse.forward.head import Head
from streamcollapse.forward.model import StreamedModel
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Compute, RunSettings
from tests.checkpoints import save_model
from tests.families import FAMILIES, MORE_FAMILIES
from tests.streams import plain_stream

TOKENS = 7


def opened(directory: Path) -> tuple[StreamedModel, int, torch.Tensor]:
    """A model, the size of its vocabulary, and hidden states [T, D]."""
    job = open_job(directory, RunSettings(Compute("cpu", "float32")))
    model = job.model(plain_stream(job))
    embedded = model.record(make_batches([list(range(2, 2 + TOKENS))], 64))[0].hidden_NTD[0]
    return model, job.vocabulary, embedded


CASES = (
    "llama",
    "gpt 2, learned positions, tied",
    "gpt-j",  # a head with a bias
    "gemma 2, sliding and full, softcapped",
    "granite, multipliers",
    "cohere, parallel",
    "opt, projected embedding",
)


@pytest.mark.parametrize("family", CASES)
def test_parts_are_the_whole(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 4 * TOKENS * 9)
    model, vocabulary, hidden = opened(save_model((FAMILIES | MORE_FAMILIES)[family](), tmp_path / "m"))
    head = Head(model, model.head(), vocabulary, hidden[:1])
    parts = list(head.parts(TOKENS))
    assert len(parts) > 2
    found = torch.cat([head.logits(hidden, words) for words in parts], dim=-1)
    torch.testing.assert_close(found, model.logits(model.head(), hidden.unsqueeze(1))[:, 0])


def test_logits_that_depend_on_other_words_are_made_at_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, vocabulary, hidden = opened(llama)
    plain = model.logits
    monkeypatch.setattr(model, "logits", lambda head, h: plain(head, h).pow(3).softmax(-1))
    expected = model.logits(model.head(), hidden.unsqueeze(1))[:, 0]
    head = Head(model, model.head(), vocabulary, hidden[:1])
    assert list(head.parts(TOKENS)) == [slice(0, vocabulary)]
    assert torch.equal(head.logits(hidden, slice(0, vocabulary)), expected)
    assert torch.equal(head.logits(hidden, slice(3, 9)), expected[:, 3:9])
    targets = torch.arange(TOKENS)
    nll = float(functional.cross_entropy(expected, targets, reduction="sum"))
    assert head.nll(hidden, targets) == pytest.approx(nll, rel=1e-6)
