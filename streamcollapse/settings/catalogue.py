"""The merge rules and the metrics there are, as data: what each does and where it is from. Knows no tensors.

Strategies are objects of their own (searches/strategies/).
"""

from dataclasses import dataclass

RULES = {
    "rdsc": "base + scale * sum of (follower - base): the paper's Eq. (1) at scale 1",
    "sequential": "the last follower, with the norms of the base: the authors' released code",
    "mean": "equal weights over the group",
    "first": "the base: its followers are dropped",
}
BEST = "best"  # all of them, in competition


@dataclass(frozen=True)
class Metric:
    """How alike a candidate is to the original; 1 is the same. ``highest`` that it can be. ``by_logits``: it needs the
    head, as the others need last hidden states."""

    summary: str
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
