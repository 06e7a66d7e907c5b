"""What healing trains: low-rank adapters on the matrices of layers (Hu et al. 2021, LoRA), or tensors of layers whole.

An adapter adds scale * up(down(x)) to what a linear module makes of x, beside its frozen matrix, as peft computes it;
in the end its product is added to the matrix, with one rounding. Masters are in float32, on the compute device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from streamcollapse.forward.model import LayerWeights, StreamedModel, Weights
from streamcollapse.merge.plan import PlanLayer

_SEED = 30
_LEAST_UNIT = 1e-4  # of a parameter that is all zeros
_NARROW = 15.0  # so that up to 576 x 1536 a matrix steps by its root mean square


@dataclass(frozen=True)
class Adapter:
    """The low-rank change of the linear ``module``, a path inside a layer: ``down`` [rank, inputs] and ``up`` [outputs,
    rank], float32; ``scale`` is alpha / rank. ``is_transposed``: its matrix is [inputs, outputs], as GPT-2 has it."""

    module: str
    down: torch.Tensor
    up: torch.Tensor
    scale: float
    is_transposed: bool

    def added(self, output: torch.Tensor, entered: torch.Tensor) -> torch.Tensor:
        """``output`` of the module with what it adds for what ``entered``; in one product, since the output is large
        and the rank is small."""
        within = functional.linear(entered, self.down.to(entered.dtype)).flatten(0, -2)
        up = self.up.to(entered.dtype)
        return torch.addmm(output.flatten(0, -2), within, up.T, alpha=self.scale).view_as(output)

    def merged(self, matrix: torch.Tensor) -> torch.Tensor:
        """``matrix`` with the change in it, in float32."""
        change = self.scale * (self.up @ self.down)
        return matrix.float() + (change.T if self.is_transposed else change)


@dataclass
class Trained:
    """The masters by 0-based position in the pruned stack: ``adapters`` of linear modules, and ``whole`` parameters of
    the layer by name; and those of final norm and ``head``. ``units``: what a learning rate is in units of, by the
    names of ``tensors``; of a whole parameter what it was is the measure (step_unit)."""

    adapters: dict[int, list[Adapter]] = field(default_factory=dict)
    whole: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    units: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        named = {f"{p}.{name}": m for p, masters in self.whole.items() for name, m in masters.items()}
        named |= {f"head.{name}": master for name, master in self.head.items()}
        self.units = {name: step_unit(master) for name, master in named.items()}

    @property
    def positions(self) -> list[int]:
        """Where something is trained, bottom first."""
        return sorted(p for p in {*self.adapters, *self.whole} if self.adapters.get(p) or self.whole.get(p))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every master by a name of its own, in a fixed order."""
        found: dict[str, torch.Tensor] = {}
        for position in self.positions:
            for adapter in self.adapters.get(position, ()):
                found[f"{position}.{adapter.module}.down"] = adapter.down
                found[f"{position}.{adapter.module}.up"] = adapter.up
            found |= {f"{position}.{name}": master for name, master in self.whole.get(position, {}).items()}
        return found | {f"head.{name}": master for name, master in self.head.items()}

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @torch.no_grad()
    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give every master the values that ``tensors`` has for it."""
        for name, master in self.tensors.items():
            master.copy_(tensors[name])

    @contextmanager
    def within(self, module: nn.Module, position: int, weights: LayerWeights) -> Iterator[LayerWeights]:
        """While the body runs, the layer ``module`` at ``position`` runs with what is trained, given these weights."""
        whole = {name: master.to(weights.parameters[name]) for name, master in self.whole.get(position, {}).items()}
        with ExitStack() as hooks:
            for adapter in self.adapters.get(position, ()):
                linear = module.get_submodule(adapter.module)
                hooks.callback(linear.register_forward_hook(_adding(adapter)).remove)
            yield LayerWeights(weights.stored, weights.parameters | whole) if whole else weights

    def results(self, position: int, weights: LayerWeights) -> Weights:
        """The parameters of the layer at ``position`` that are other than in ``weights``, by name, in float32."""
        merged = {
            f"{a.module}.weight": a.merged(weights.parameters[f"{a.module}.weight"])
            for a in self.adapters.get(position, ())
        }
        return merged | {name: master.detach() for name, master in self.whole.get(position, {}).items()}


@torch.no_grad()
def step_unit(tensor: torch.Tensor) -> float:
    """What a learning rate of Adam is in units of, for a ``tensor`` that is trained whole: its root mean square, and
    less where it is a wide matrix. A step moves every number by the rate, and many in agreement: it can be as large
    as rate * sqrt(m n) where a matrix [m, n] of random numbers is sqrt(m) + sqrt(n), by the largest singular value."""
    unit = max(float(tensor.float().square().mean().sqrt()), _LEAST_UNIT)
    if tensor.dim() < 2:
        return unit
    rows, columns = tensor.shape[-2:]
    return unit * min(1.0, _NARROW * (1.0 / math.sqrt(rows) + 1.0 / math.sqrt(columns)))


def _adding(adapter: Adapter) -> Any:
    return lambda module, args, output: adapter.added(output, args[0])


@dataclass(frozen=True)
class Adapting:
    """Adapters of ``rank``, which count alpha / rank times, on every linear module of layers, or on those whose last
    names are ``targets``."""

    rank: int
    alpha: float
    targets: Sequence[str] = ()


def adapted(model: StreamedModel, layers: Sequence[PlanLayer], positions: Sequence[int], how: Adapting) -> Trained:
    """Adapters on the layers at ``positions`` of ``layers``; they change nothing yet. Drawn as peft draws them, from a
    seed of each position and module."""
    found, size = Trained(), (how.rank, how.alpha)
    for position in positions:
        base = layers[position].base
        modules = linear_modules(model.module(base), model.layout.stored_whole(base), how.targets)
        found.adapters[position] = [
            _fresh(path, shape, size, position, model.placement.device) for path, shape in modules.items()
        ]
    return found


def linear_modules(
    layer: nn.Module, writable: Collection[str], targets: Sequence[str] = ()
) -> dict[str, tuple[int, int, bool]]:
    """The linear modules of ``layer`` whose matrix is one of the ``writable`` parameters, or those whose last names are
    ``targets``: outputs, inputs, and whether the matrix is [inputs, outputs], by path."""
    found: dict[str, tuple[int, int, bool]] = {}
    for path, part in layer.named_modules():
        is_wanted = not targets or path.rpartition(".")[2] in targets
        if isinstance(part, (nn.Linear, Conv1D)) and f"{path}.weight" in writable and is_wanted:
            rows, columns = part.weight.shape
            is_transposed = isinstance(part, Conv1D)
            found[path] = (columns, rows, True) if is_transposed else (rows, columns, False)
    return found


def _fresh(
    path: str, shape: tuple[int, int, bool], size: tuple[int, float], position: int, device: torch.device
) -> Adapter:
    (outputs, inputs, is_transposed), (rank, alpha) = shape, size
    seed = _SEED + sum(byte * 257**n for n, byte in enumerate(f"{position}.{path}".encode())) % (1 << 61)
    generator = torch.Generator().manual_seed(seed)
    down = (2.0 * torch.rand(rank, inputs, generator=generator) - 1.0) / math.sqrt(inputs)
    up = torch.zeros(outputs, rank)
    return Adapter(path, _master(down, device), _master(up, device), alpha / rank, is_transposed)


def _master(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.to(device=device, dtype=torch.float32, copy=True).requires_grad_()


def as_masters(weights: Weights, names: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
    """The parameters ``names`` of a layer with ``weights``, to be trained whole."""
    return {name: _master(weights[name].detach(), device) for name in names}
