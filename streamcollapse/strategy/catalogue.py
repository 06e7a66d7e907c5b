"""The strategies and the metrics there are: what each does, where it is from, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """``reads``: multiples of the model that reference pass and search read. The defaults of what goes with it:
    ``rule`` and ``metric``, where they matter, ``samples``, ``rescale``. ``needs_target``: it only stops at a
    target. ``takes``: of the settings of the search that some strategies have no use for, those it goes by."""

    does: str
    source: str
    reads: str
    rule: str | None
    metric: str | None
    needs_target: bool = False
    samples: str = "sentences"
    rescale: bool = False
    takes: tuple[str, ...] = ()


STRATEGIES = {
    "laco": Strategy(
        "walks down the stack and keeps each merge of C layers whose similarity is above the threshold",
        "Yang et al. 2024, Algorithm 1 (arXiv 2402.11187)",
        "1 for the reference, and as few sweeps as look-ahead can make of the candidates",
        "sequential",
        "cosine",
        takes=("layers_per_merge", "interval", "threshold"),
    ),
    "greedy": Strategy(
        "scores every merge of two neighbours and takes the best, round after round",
        "Song et al. 2024, SLEB (arXiv 2402.09025), there by perplexity and without merges",
        "1 for the reference, up to 1 for each layer that goes where memory holds a round's candidates, "
        "and 2 for each round of scales",
        "first",
        "kl",
        samples="passages",
        rescale=True,
        takes=("threshold", "merges_per_round"),
    ),
    "rule-based": Strategy(
        "merges groups of C layers from the top, I layers apart, without looking",
        "Yang et al. 2024, appendix B.7",
        "1 for the reference, up to 1 to say how similar each step leaves the model",
        "sequential",
        "cosine",
        takes=("layers_per_merge", "interval"),
    ),
    "block-influence": Strategy(
        "drops the layers that change their input least, by the cosine of each token",
        "Men et al. 2024, ShortGPT (arXiv 2403.03853)",
        "1",
        None,
        None,
        needs_target=True,
    ),
    "angular": Strategy(
        "drops the block of neighbouring layers between whose ends the last token turns least",
        "Gromov et al. 2024 (arXiv 2403.17887)",
        "1",
        None,
        None,
        needs_target=True,
    ),
}


@dataclass(frozen=True)
class Metric:
    """How alike a candidate is to the original; 1 is the same. ``highest`` that it can be. ``by_logits``: it needs the
    head, as the others need last hidden states."""

    does: str
    source: str
    highest: float = 1.0
    by_logits: bool = False


METRICS = {
    "cosine": Metric("cosine of a sample's last hidden states, flattened; mean over samples", "Yang et al. 2024, 2.2"),
    "token-cosine": Metric("cosine of each token's last hidden states; mean over tokens", "as ShortGPT between layers"),
    "nll": Metric(
        "perplexity of the original on the samples over the candidate's", "Song et al. 2024, SLEB", 1e6, by_logits=True
    ),
    "kl": Metric(
        "exp(-KL) of the next-token distributions, original against candidate; KL is the mean over tokens in nats",
        "Yang et al. 2024, B.5 in name",
        by_logits=True,
    ),
    "cka-linear": Metric(
        "linear CKA of last hidden states, token by token; mean over samples", "Kornblith et al. 2019"
    ),
    "cka-kernel": Metric("CKA with an RBF kernel at the median distance", "Kornblith et al. 2019"),
}
