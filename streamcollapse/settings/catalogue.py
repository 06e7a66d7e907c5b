"""The merge rules, the metrics and the efforts there are, as data: what each does, where it is from. Knows no tensors.

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


LEAST_HEAD_TOKENS = 512
MOST_EXCHANGE_LOGITS = 5 << 26  # so that in 16 bits there is room for those of the original (forward/batches.py)


@dataclass(frozen=True)
class Effort:
    """How much a search computes.

    ``tokens``: of a sample, at the most. ``scouting``: on how many tokens of a sample what may be chosen is told from
    what may not, before it is scored. ``head_logits``: about how many logits are compared in all, but those of
    LEAST_HEAD_TOKENS at the least. None of these: all. ``lazy``: a round of greedy search scores only merges that may
    be its best, one of scales goes further than a step. ``least_gain``: of the loss; a round of scales that takes less
    off is the last. ``exchanges``: of how many times as many tokens the end of a search that drops layers is
    compared with its neighbours, but of MOST_EXCHANGE_LOGITS at the most; 0: it is not. ``repair``: how a
    pruned model is repaired before it is written, where nobody says it.
    """

    summary: str
    tokens: int | None = None
    scouting: int | None = None
    head_logits: int | None = 1 << 25
    lazy: bool = True
    least_gain: float = 0.03
    exchanges: int = 0
    repair: str = "auto"

    def head_tokens(self, vocabulary: int) -> int | None:
        """Of how many tokens the next-token distributions are compared; None: of all."""
        return None if self.head_logits is None else max(self.head_logits // vocabulary, LEAST_HEAD_TOKENS)

    def exchange_tokens(self, vocabulary: int) -> int | None:
        """Of how many tokens they are compared in exchanges; None: of all."""
        tokens = self.head_tokens(vocabulary)
        return None if tokens is None else min(self.exchanges * tokens, MOST_EXCHANGE_LOGITS // vocabulary)


EFFORTS = {
    "quick": Effort("as standard, on the first 64 tokens of each sample, and no repair", tokens=64, repair="none"),
    "standard": Effort(
        "only merges that may be the best of a round are scored, by the distributions of a part of the tokens; layers "
        "beside those that went are tried in their place, by more tokens",
        scouting=64,
        exchanges=4,
    ),
    "thorough": Effort(
        "every merge is scored in every round, by all tokens", head_logits=None, lazy=False, least_gain=0.0
    ),
}
