"""Whether a result is good for anything, from its loss beside its source's on text that no search saw."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

if TYPE_CHECKING:  # reports are read where no model is
    from streamcollapse.forward.perplexity import Perplexity

# Rises of the loss in nats per token (docs/decisions/0023-verdicts.md)
USABLE = 0.2  # perplexity times 1.22
BROKEN = 2.0  # perplexity times 7.4


class Pair(TypedDict):
    """A figure of the source and of the result; None: infinite."""

    before: float
    after: float | None


class Judgement(TypedDict):
    """The result beside its source on ``text``, over ``tokens`` predicted tokens: ``loss`` and its ``rise`` in nats per
    token, and a ``verdict`` in words. None where the result's values are not finite."""

    text: str
    tokens: int
    loss: Pair
    perplexity: Pair
    rise: float | None
    verdict: str


def judge(text: str, before: Perplexity, after: Perplexity) -> Judgement:
    """What is said of a result that comes to ``after`` where its source comes to ``before``."""
    is_finite = math.isfinite(after.perplexity)
    return Judgement(
        text=text,
        tokens=before.tokens,
        loss=Pair(before=before.nll, after=after.nll if is_finite else None),
        perplexity=Pair(before=before.perplexity, after=after.perplexity if is_finite else None),
        rise=after.nll - before.nll if is_finite else None,
        verdict=_in_words(after.nll - before.nll),
    )


def _in_words(rise: float) -> str:
    if rise <= USABLE:
        return "usable"
    return "needs healing" if rise <= BROKEN else "broken: do not use"


def is_broken(judgement: Judgement) -> bool:
    """Whether the result is good for nothing as it is."""
    return judgement["rise"] is None or judgement["rise"] > BROKEN


def exceeds(judgement: Judgement | None, max_loss: float | None) -> bool:
    """Whether the loss rose by more than was allowed, if anything was."""
    if judgement is None or max_loss is None:
        return False
    return judgement["rise"] is None or judgement["rise"] > max_loss


def told(judgement: Judgement) -> str:
    """The judgement in a line."""
    loss, perplexity, rise = judgement["loss"], judgement["perplexity"], judgement["rise"]
    if rise is None or loss["after"] is None or perplexity["after"] is None:
        figures = "the loss is infinite"
    else:
        figures = f"loss {loss['before']:.3f} -> {loss['after']:.3f} ({rise:+.3f} nats), perplexity "
        figures += f"{perplexity['before']:.4g} -> {perplexity['after']:.4g}"
    return f"{judgement['verdict']}: {figures}"
