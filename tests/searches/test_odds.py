"""AcceptModel: what each kind of history predicts, and that the mixture does not fall far behind its best expert."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcollapse.merge.record import Decision
from streamcollapse.searches.lookahead import _PRIOR, AcceptModel, Forecast, SimilarityForecast


def _odds(outcomes: str, similarities: list[float | None] | None = None, threshold: float = 0.65) -> AcceptModel:
    odds = AcceptModel(threshold)
    for i, outcome in enumerate(outcomes):
        similarity = similarities[i] if similarities else None
        odds.learn(Decision(10, 2, similarity, outcome == "A"))
    return odds


def _accept(outcomes: str) -> float:
    return _odds(outcomes).forecast().accept


def _losses(outcomes: str) -> tuple[float, list[float]]:
    """Log loss in nats of the mixture, and of each expert, over ``outcomes``."""
    belief, mixture, experts = Forecast(0.65), 0.0, [0.0] * len(_PRIOR)
    for outcome in outcomes:
        accepted = outcome == "A"
        mixture -= math.log(belief.accept if accepted else 1.0 - belief.accept)
        for number, p in enumerate(belief.predictions):
            experts[number] -= math.log(p if accepted else 1.0 - p)
        belief = belief.after(accepted)
    return mixture, experts


def test_without_history_both_outcomes_are_as_likely() -> None:
    assert AcceptModel(0.65).forecast().accept == 0.5
    assert math.isclose(sum(_PRIOR), 1.0)


def test_the_first_expert_is_krichevsky_trofimov() -> None:
    assert _odds("AARA").forecast().predictions[0] == (3 + 0.5) / (4 + 1)
    assert _odds("RRR").forecast().predictions[:4] == (0.5 / 4, 0.5 / 3, 0.5 / 2, 0.5)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_independent_outcomes_are_predicted_by_their_frequency(rate: float) -> None:
    draw = random.Random(7)
    errors = []
    for _ in range(20):
        outcomes = "".join("A" if draw.random() < rate else "R" for _ in range(80))
        errors.append(_accept(outcomes) - (outcomes.count("A") + 0.5) / (len(outcomes) + 1))
    assert abs(sum(errors) / len(errors)) < 0.06
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.15


@pytest.mark.parametrize("period", ["AR", "ARR", "AAR", "AARR", "AAARRR", "AAAARRRR"])
def test_a_period_is_predicted_after_it_came_back_a_few_times(period: str) -> None:
    history = period * 4
    for next_outcome in period:
        probability = _accept(history) if next_outcome == "A" else 1.0 - _accept(history)
        assert probability > 0.75, (history, next_outcome)
        history += next_outcome


def test_runs_are_expected_to_go_on() -> None:
    assert _accept("A" * 12 + "R" * 12) < 0.2
    assert _accept("R" * 12 + "A" * 12) > 0.8


@pytest.mark.parametrize("outcomes", ["A" * 60, "AR" * 30, "AAAARRRR" * 8, "ARRARAARRRARAAAR" * 4, "R" * 30 + "A" * 30])
def test_the_mixture_stays_near_its_best_expert(outcomes: str) -> None:
    mixture, experts = _losses(outcomes)
    prior = -math.log(min(_PRIOR))
    shared = len(outcomes) * 0.02  # what fixed share takes from the best expert's weight, in nats, at most
    assert mixture <= min(experts) + prior + shared + len(outcomes) * 0.031  # the odds are never above 0.97


@settings(deadline=None)
@given(outcomes=st.text("AR", max_size=30))
def test_a_hypothetical_path_is_believed_as_a_real_one(outcomes: str) -> None:
    real, path = AcceptModel(0.65), Forecast(0.65)
    for outcome in outcomes:
        real.learn(Decision(10, 2, None, outcome == "A"))
        path = path.after(outcome == "A")
    assert path == real.forecast()
    assert math.isclose(sum(path.weights), 1.0)


def test_similarities_move_the_odds() -> None:
    near, far = (_odds("RR", list(pair)).forecast() for pair in ((0.60, 0.64), (0.10, 0.14)))
    assert near.near is not None
    assert far.near is not None
    assert near.near.mean == 0.64
    assert math.isclose(near.near.spread, 0.04)
    assert near.accept > far.accept
    above, below = far.after(True).near, far.after(False).near
    assert above is not None
    assert below is not None
    assert above.mean == 0.65, "an accept means that it was above"
    assert below.spread > far.near.spread


def test_nearness_is_a_normal_distribution() -> None:
    assert SimilarityForecast(0.65, 0.1).above(0.65) == 0.5
    assert math.isclose(SimilarityForecast(0.75, 0.1).above(0.65), 0.8413447, rel_tol=1e-6)


def test_similarities_that_move_smoothly_are_trusted() -> None:
    similarities: list[float | None] = [0.65 + 0.1 * math.sin(i / 4) for i in range(60)]
    odds, right = AcceptModel(0.65), 0
    for similarity in similarities:
        accepted = similarity is not None and similarity > 0.65
        right += (odds.forecast().accept > 0.5) == accepted
        odds.learn(Decision(10, 2, similarity, accepted))
    assert right >= 50
    assert odds.forecast().weights[-1] > 0.5


@pytest.mark.parametrize("outcomes", ["ARARAR", "RRRRRR", "AAAAAA"])
def test_odds_are_never_certain(outcomes: str) -> None:
    belief = _odds(outcomes * 10, [1.0 if o == "A" else -1.0 for o in outcomes * 10]).forecast()
    assert 0.0 < belief.accept < 1.0
