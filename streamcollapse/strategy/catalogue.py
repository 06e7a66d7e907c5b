"""The strategies there are: what each does, where it is from, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """``reads``: multiples of the model that reference pass and search read. ``rule``: the default, where merge rules
    matter. ``needs_target``: it only stops at a target."""

    does: str
    source: str
    reads: str
    rule: str | None
    needs_target: bool = False


STRATEGIES = {
    "laco": Strategy(
        "walks down the stack and keeps each merge of C layers whose similarity is above the threshold",
        "Yang et al. 2024, Algorithm 1 (arXiv 2402.11187)",
        "1 for the reference, and as few sweeps as look-ahead can make of the candidates",
        "sequential",
    ),
    "greedy": Strategy(
        "scores every merge of two neighbours and takes the best, round after round",
        "Song et al. 2024, SLEB (arXiv 2402.09025), there by perplexity and without merges",
        "1 for the reference, up to 1 for each layer that goes where memory holds a round's candidates",
        "first,sequential",
    ),
    "rule-based": Strategy(
        "merges groups of C layers from the top, I layers apart, without looking",
        "Yang et al. 2024, appendix B.7",
        "1 for the reference, up to 1 to say how similar each step leaves the model",
        "sequential",
    ),
    "block-influence": Strategy(
        "drops the layers that change their input least, by the cosine of each token",
        "Men et al. 2024, ShortGPT (arXiv 2403.03853)",
        "1",
        None,
        needs_target=True,
    ),
    "angular": Strategy(
        "drops the block of neighbouring layers between whose ends the last token turns least",
        "Gromov et al. 2024 (arXiv 2403.17887)",
        "1",
        None,
        needs_target=True,
    ),
}
