"""What a repair needs in memory, how many input channels it can solve for at a time within a budget, and how long it
takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamcollapse.forward.batches import activation_bytes
from streamcollapse.storage.source import TensorInfo

if TYPE_CHECKING:
    from streamcollapse.run.needs import MemoryPlan, Workload

_FLOAT64, _FLOAT32 = 8, 4
_MOMENTS = 4  # numbers in float32 for each that is trained: itself, its gradient, two moments
_KEPT = 4  # times the activations of a call that its gradients need
SOLVES, TRAINS = ("auto", "linear"), ("auto", "local")  # methods by what they do with a layer
LEAST_BLOCK = 256  # input channels
_SOLVING = 4  # runs of a layer over the text: for the sums, and by each penalty over what is held out
_TRAINING = 8 * 3  # rounds of a fit by Adam: up, and twice as much down
CUT_ROUNDS, CUT_JUDGEMENTS = 2, 2  # end to end, over the text; beside the one before the first step


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
    return Mending(tokens, call, item, inputs, hidden, numbers, method in SOLVES, method in TRAINS)


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
    states = 3 if mending.solved and mending.trained else 2  # what enters the lowest fit is kept for the last step
    yield (
        "hidden states of two stacks" + (", a call at a time (the others on the disk)" if plan.spill else ""),
        states * per_token * (mending.call if plan.spill else mending.tokens),
    )
    if mending.solved:
        yield "sums of least squares", block_bytes(mending, plan.gram_block or mending.inputs)
    if mending.trained:
        widest = [(mending.inputs, mending.hidden)]
        activations = activation_bytes(widest, mending.hidden, (1, mending.call), mending.item)
        yield "a layer in training", mending.numbers * _FLOAT32 * _MOMENTS + _KEPT * activations


@dataclass(frozen=True)
class Cuts:
    """A stack of ``kept`` of ``source`` layers, its ``lowest`` cut above that position, and the ``count`` of its cuts:
    one to three where a search dropped layers, on the models at hand."""

    source: int
    kept: int
    lowest: int
    count: int = 2


@dataclass(frozen=True)
class RepairText:
    """Tokens that are fitted to, and ``held_out``; end to end, one in ``every`` of them has a loss."""

    fit: int
    held_out: int
    every: int


def repair_seconds(
    method: str, text: RepairText, stack: Cuts, each: tuple[float, float], graphs: bool
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each phase, as TimeExpected has them, of a repair of ``stack`` by ``method`` on ``text``. ``each``:
    seconds of a token in a layer and in the head. ``graphs``: those of all layers are kept in the last step."""
    layer, word = each
    whole, above = text.fit + text.held_out, stack.kept - stack.lowest
    fits = (_SOLVING if method in SOLVES else 0) + (_TRAINING if method in TRAINS else 0)
    found = {"repair": whole * (stack.source + above) * layer + stack.count * fits * text.fit * layer}
    if method == "auto":
        head = word / text.every
        learned = CUT_ROUNDS * text.fit * ((3 if graphs else 4) * above * layer + 4 * head)
        found["end to end"] = learned + (CUT_JUDGEMENTS + 1) * text.held_out * (above * layer + 2 * head)
    found["repair check"] = text.held_out * 2 * (stack.kept * layer + word)
    return {phase: [(seconds, 0.0)] for phase, seconds in found.items()}
