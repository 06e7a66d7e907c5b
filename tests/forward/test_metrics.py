from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from streamcollapse.forward.metrics import cosine_similarities, kernel_cka, linear_cka, token_cosines
from tests.in_memory import hsic


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


def test_cosines_of_tokens() -> None:
    a = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [5.0, 5.0]]])
    b = torch.tensor([[[-2.0, 0.0], [4.0, 3.0]], [[0.0, 7.0], [0.0, 0.0]]])
    assert token_cosines(a, b, [2, 1]) == pytest.approx([-1.0, 24 / 25, math.sqrt(0.5)])
    assert math.isnan(token_cosines(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), [1])[0])


@pytest.mark.parametrize("cka", [linear_cka, kernel_cka])
def test_alignment_of_kernels(cka: Callable[..., list[float]]) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 9, 5, generator=g), torch.randn(2, 9, 5, generator=g)
    turned, _ = torch.linalg.qr(torch.randn(5, 5, generator=g))
    assert cka(3.0 * x @ turned + 7.0, x, [9, 6]) == pytest.approx([1.0, 1.0], abs=1e-5), "rotation, scale, offset"
    name = "cka-linear" if cka is linear_cka else "cka-kernel"
    plain = []
    for a, b, length in zip(x.double(), y.double(), (9, 6), strict=True):
        a, b = a[:length], b[:length]
        plain.append(float(hsic(a, b, name) / (hsic(a, a, name) * hsic(b, b, name)).sqrt()))
    assert cka(x, y, [9, 6]) == pytest.approx(plain, abs=1e-9)
    assert max(plain) < 0.9
    assert cka(x, y, [9, 1]) == pytest.approx(plain[:1]), "one token says nothing"
    assert math.isnan(cka(torch.ones(1, 3, 2), torch.ones(1, 3, 2), [3])[0]), "nor do equal ones"
