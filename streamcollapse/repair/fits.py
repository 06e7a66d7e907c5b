"""The ways to fit a layer, by the names that users know."""

from __future__ import annotations

from streamcollapse.repair.layer import FittedLayer
from streamcollapse.repair.linear import linear_fit
from streamcollapse.repair.local import local_fit
from streamcollapse.repair.magnitude import Magnitudes
from streamcollapse.repair.mend import Fit


def fit_by(method: str, block: int | None) -> Fit:
    """How ``auto``, ``linear``, ``local`` or ``magnitude`` fits a layer; ``block``: input channels that are solved for
    at a time."""
    if method == "magnitude":
        return Magnitudes()
    steps = {"auto": (True, True), "linear": (True, False), "local": (False, True)}
    solves, trains = steps[method]

    def fit(layer: FittedLayer, before: float) -> tuple[FittedLayer, str, float] | None:
        words, error = list[str](), before
        solved = linear_fit(layer, error, block) if solves else None
        if solved is not None:
            layer, error = solved.layer, solved.error
            words.append(f"linear: {solved.suffix}, penalty {solved.penalty:g}")
        trained = local_fit(layer, error) if trains else None
        if trained is not None:
            layer, error = trained.layer, trained.error
            words.append(f"local: {trained.rounds} rounds")
        return (layer, "; ".join(words), error) if words else None

    return fit
