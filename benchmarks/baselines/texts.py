"""Texts as token ids, for baselines that fit a model and are judged: made by bench_mending.py.

A file is {"fit": [ids, ..], "judge": {kind: [[ids, predicted], ..]}}: windows that may be learned from, and windows of
each kind of text that judge, with how many of their last tokens are predicted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Windows = list[list[int]]


@dataclass(frozen=True)
class Texts:
    """``fit``: windows of token ids; ``judge``: such by kind, and how many of their last tokens are predicted."""

    fit: Windows
    judge: dict[str, list[tuple[list[int], int]]]

    @classmethod
    def read(cls, path: Path) -> Texts:
        """As the file has them."""
        document = json.loads(path.read_text(encoding="utf-8"))
        judge = {kind: [(ids, count) for ids, count in windows] for kind, windows in document["judge"].items()}
        return cls(document["fit"], judge)


@torch.no_grad()
def losses(model: Any, texts: Texts) -> dict[str, float]:
    """The mean loss of a predicted token on each kind of text, in nats."""
    model.eval()
    found = {}
    for kind, windows in texts.judge.items():
        total, tokens = 0.0, 0
        for ids, predicted in windows:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -predicted - 1 : -1].float()
            wanted = torch.tensor(ids[-predicted:])
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += predicted
        found[kind] = total / tokens
    return found


def parameters(model: Any) -> int:
    """How many numbers it has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
