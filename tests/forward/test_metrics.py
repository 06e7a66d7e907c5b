from __future__ import annotations

import math

import pytest
import torch

from streamcollapse.forward.metrics import cosine_similarities


def test_against_hand_and_torch() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[3.0, 4.0], [9.0, 9.0]]])
    b = torch.tensor([[[1.0, 0.0], [0.0, -1.0]], [[4.0, 3.0], [0.0, 0.0]]])
    # flattened: (1,0,0,1).(1,0,0,-1) = 0; with one token (3,4).(4,3) / 25
    assert cosine_similarities(a, b, [2, 1]) == [pytest.approx(0.0), pytest.approx(24 / 25)]
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 7, 5, generator=g), torch.randn(1, 7, 5, generator=g)
    expected = torch.nn.functional.cosine_similarity(x[0].flatten(), y[0].flatten(), dim=0).item()
    assert cosine_similarities(x, y, [7]) == [pytest.approx(expected, abs=1e-6)]


def test_padding_does_not_count() -> None:
    a, b = torch.ones(1, 5, 3), torch.ones(1, 5, 3)
    b[0, 3:] = -100.0
    assert cosine_similarities(a, b, [3]) == [1.0]


def test_equal_states_never_exceed_one() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = torch.randn(1, 9, 11, generator=g)
        assert cosine_similarities(x, x.clone(), [9])[0] <= 1.0
        assert cosine_similarities(x, -x, [9])[0] >= -1.0


def test_what_is_no_number_stays_none() -> None:
    x = torch.ones(1, 2, 2)
    x[0, 0, 0] = float("inf")
    assert math.isnan(cosine_similarities(x, torch.ones(1, 2, 2), [2])[0])
    assert math.isnan(cosine_similarities(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), [2])[0])
