"""Merge rules: pure functions from the mixes of a group of neighbouring layers to the mix of the merged layer.

A mix says which linear combination of **source** layers a layer is. Because every rule is linear in the layers,
a merge of merged layers is again a mix of source layers, however often layers collapse onto each other.
"""

from collections.abc import Callable, Mapping, Sequence

Mix = Mapping[int, float]  # source layer (0-based) -> coefficient, none of them zero

RuleFunction = Callable[[Sequence[Mix], float], dict[int, float]]


def rdsc(mixes: Sequence[Mix], scale: float) -> dict[int, float]:
    """b + scale * sum_k (k - b): Eq. (1) of the paper for ``scale`` 1, the mean of the group for 1/len(mixes)."""
    followers = len(mixes) - 1
    return _combine([(1.0 - scale * followers, mixes[0]), *((scale, mix) for mix in mixes[1:])])


def sequential(mixes: Sequence[Mix], scale: float) -> dict[int, float]:
    """The last follower: what the authors' released code computes.

    Each difference is taken against the base as already updated, b <- b + (k - b), so the sum telescopes.
    """
    return dict(mixes[-1])


def mean(mixes: Sequence[Mix], scale: float) -> dict[int, float]:
    """Equal weights over the group."""
    return _combine([(1.0 / len(mixes), mix) for mix in mixes])


def first(mixes: Sequence[Mix], scale: float) -> dict[int, float]:
    """The base alone: its followers are dropped."""
    return dict(mixes[0])


RULES: dict[str, RuleFunction] = {"rdsc": rdsc, "sequential": sequential, "mean": mean, "first": first}


def _combine(terms: Sequence[tuple[float, Mix]]) -> dict[int, float]:
    total: dict[int, float] = {}
    for weight, mix in terms:
        for layer, coefficient in mix.items():
            total[layer] = total.get(layer, 0.0) + weight * coefficient
    return {layer: total[layer] for layer in sorted(total) if total[layer] != 0.0}
