"""Tensors in the place of parameters, against torch.func.functional_call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from streamcollapse.arch.substitute import Substitute


class Tied(nn.Module):
    """An embedding that is its head, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.inner(self.embed(ids)) + self.shift)
        return found


def test_it_computes_with_what_it_is_given_and_is_what_it_was_again() -> None:
    torch.manual_seed(0)
    module, ids = Tied(), torch.tensor([1, 4])
    given = {
        "embed.weight": torch.randn(5, 3, requires_grad=True),
        "inner.bias": torch.randn(3, requires_grad=True),
        "shift": torch.randn(3),
    }
    before = {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    substitute = Substitute(module)
    with substitute.holding(given) as holding:
        ours = holding(ids)
    theirs = functional_call(module, given, (ids,))
    assert torch.equal(ours, theirs), "the head is the embedding, by one name of it"
    leaves = [given["embed.weight"], given["inner.bias"]]
    for one, other in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True
    ):
        assert torch.equal(one, other)
    with substitute.holding({"head.weight": given["embed.weight"]}) as holding:
        assert torch.equal(holding(ids), functional_call(module, {"head.weight": given["embed.weight"]}, (ids,)))
    with pytest.raises(ValueError, match="in the body"), substitute.holding(given):
        raise ValueError("in the body")
    with pytest.raises(KeyError, match="nothing"), substitute.holding({"shift": given["shift"], "nothing": ids}):
        pass
    assert {name: id(t) for name, t in [*module.named_parameters(), *module.named_buffers()]} == before
