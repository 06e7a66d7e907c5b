"""What a repair needs in memory, and how many input channels it can solve for at a time within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamcollapse.storage.source import TensorInfo

if TYPE_CHECKING:
    from streamcollapse.run.needs import MemoryPlan, Workload

_FLOAT64, _FLOAT32 = 8, 4
_MOMENTS = 4  # numbers in float32 for each that is trained: itself, its gradient, two moments
_KEPT = 4  # times the activations of a call that its gradients need
LEAST_BLOCK = 256  # input channels


@dataclass(frozen=True)
class Mending:
    """``tokens`` that are fitted to or held out, ``call`` of them in a call, ``item`` bytes a number in the compute
    dtype; ``inputs`` of the widest matrix of a layer, ``hidden`` channels between layers, ``numbers`` in a layer;
    whether they are ``trained`` and a matrix is ``solved``."""

    tokens: int
    call: int
    item: int
    inputs: int
    hidden: int
    numbers: int
    solved: bool
    trained: bool


def mending_of(layers: Sequence[Sequence[TensorInfo]], hidden: int, item: int, repair: tuple[str, int, int]) -> Mending:
    """The repair by a method, on so many tokens, in calls of so many, of a model with these tensors in its layers."""
    method, tokens, call = repair
    inputs = max((max(info.shape) for layer in layers for info in layer if len(info.shape) == 2), default=hidden)
    numbers = max(sum(info.num_elements for info in layer) for layer in layers)
    return Mending(tokens, call, item, inputs, hidden, numbers, method != "local", method != "linear")


def block_bytes(mending: Mending, block: int) -> int:
    """Gram matrix, damped copy and factor of ``block`` channels; what they are to give, and the solution."""
    return _FLOAT64 * (3 * block * block + 3 * block * mending.hidden)


def repair_needs(work: Workload, plan: MemoryPlan) -> Iterator[tuple[str, int]]:
    """What a repair holds where layers are computed, beside weights, and how many bytes."""
    mending = work.mending
    if mending is None:
        return
    per_token = mending.hidden * mending.item
    yield "hidden states as embedded", mending.tokens * per_token
    yield (
        "hidden states of two stacks" + (", a call at a time (the others on the disk)" if plan.spill else ""),
        2 * per_token * (mending.call if plan.spill else mending.tokens),
    )
    if mending.solved:
        yield "sums of least squares", block_bytes(mending, plan.gram_block or mending.inputs)
    if mending.trained:
        yield "a layer in training", mending.numbers * _FLOAT32 * _MOMENTS + _KEPT * work.activations
