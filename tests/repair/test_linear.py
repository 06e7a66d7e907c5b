"""The closed form against numpy's least squares on the model's own forward in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from streamcollapse.forward.batches import make_batches
from streamcollapse.healing.teacher import Layers, states_above, teacher_states
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.repair.climb import plan_climb
from streamcollapse.repair.layer import FittedLayer, Matrices
from streamcollapse.repair.linear import linear_fit
from streamcollapse.repair.mend import How, Mended, mend
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Compute, RunSettings
from streamcollapse.storage.scratch import Scratch
from tests.checkpoints import save_model
from tests.families import FAMILIES
from tests.in_memory import find_layers
from tests.streams import plain_stream

LENGTH, WORDS = 24, 40
CUT = (2, 3)  # dropped of six layers
FITTED, HELD = 80, 8  # texts

# The matrix that the layer's output is linear in, as the model's code names it, and the factor; None: there is none.
WRITERS: dict[str, tuple[str, float] | None] = {
    "llama": ("mlp.down_proj", 1.0),
    "mistral, sliding": ("mlp.down_proj", 1.0),
    "qwen 3, norms on q and k": ("mlp.down_proj", 1.0),
    "phi 3, packed projections": ("mlp.down_proj", 1.0),
    "opt, projected embedding": ("fc2", 1.0),
    "bloom, alibi": ("mlp.dense_4h_to_h", 1.0),
    "gpt 2, learned positions, tied": ("mlp.c_proj", 1.0),
    "gpt neox, renamed head, parallel residual": ("mlp.dense_4h_to_h", 1.0),
    "starcoder 2, biases": ("mlp.c_proj", 1.0),
    "cohere, parallel": ("mlp.down_proj", 1.0),
    "granite, multipliers": ("mlp.down_proj", 0.5),
    "gemma 2, sliding and full, softcapped": None,
    "gemma 3, two rotary bases": None,
    "olmo 2, norms after": None,
    "mixtral, experts": None,
}


def texts(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, WORDS, (LENGTH,), generator=generator).tolist() for _ in range(count)]


def cut_layers() -> tuple[PlanLayer, ...]:
    return tuple(layer for layer in original_layers(6) if layer.base not in CUT)


def mended(
    directory: Path, fit: Callable[[FittedLayer, float], Any], layers: tuple[PlanLayer, ...] | None = None
) -> tuple[list[Mended], list[Matrices]]:
    job = open_job(directory, RunSettings(Compute("cpu", "float32")))
    stored: list[Matrices] = []

    def store(one: Mended, matrices: Matrices) -> dict[str, str]:
        if matrices:
            stored.append(matrices)
        return dict.fromkeys(matrices, "0" * 64)

    batches = make_batches(texts(FITTED, 1), 64), make_batches(texts(HELD, 2), 64)
    return mend(job.model(plain_stream(job)), layers or cut_layers(), batches, How(fit, store)).done, stored


class InMemory:
    """The layer before the cut, run by transformers: what enters its matrix, what leaves it, what should."""

    def __init__(self, directory: Path, module: str, token_ids: list[list[int]]) -> None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        entered: list[torch.Tensor] = []
        layer = find_layers(model)[CUT[0] - 1]
        layer.get_submodule(module).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        with torch.no_grad():
            states = model(torch.tensor(token_ids), output_hidden_states=True, use_cache=False).hidden_states
        weight = layer.get_submodule(module).weight.detach()
        self.is_transposed = type(layer.get_submodule(module)).__name__ == "Conv1D"
        self.matrix = (weight.T if self.is_transposed else weight).double().numpy()
        self.inputs = entered[0].reshape(-1, self.matrix.shape[1]).double().numpy()
        self.left, self.wanted = (states[n].flatten(0, 1).double().numpy() for n in (CUT[0], CUT[1] + 1))

    def solved(self, factor: float, penalty: float) -> np.ndarray:
        """The least squares of the weighted tokens, stacked on the penalty."""
        weight = 1.0 / np.linalg.norm(self.wanted, axis=1, keepdims=True)
        left = weight * factor * self.inputs
        damping = penalty * (left**2).sum(0).mean()
        width = self.inputs.shape[1]
        rows = np.vstack([left, np.sqrt(damping) * np.eye(width)])
        aims = np.vstack([weight * (self.wanted - self.left), np.zeros((width, self.wanted.shape[1]))])
        return self.matrix + np.linalg.lstsq(rows, aims, rcond=None)[0].T

    def error(self, factor: float, matrix: np.ndarray) -> float:
        away = self.left + factor * self.inputs @ (matrix - self.matrix).T - self.wanted
        return float(((away**2).sum(1) / (self.wanted**2).sum(1)).mean())


@pytest.mark.parametrize("family", [name for name, writer in WRITERS.items() if writer is not None])
def test_the_matrix_that_is_found_is_solved_for_as_numpy_does(family: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=1.0)
    found: list[Any] = []

    def fit(layer: FittedLayer, before: float) -> Any:
        found.append((layer, before, linear_fit(layer, before)))
        return None if found[-1][2] is None else (found[-1][2].layer, "linear", found[-1][2].error)

    (done,), (matrices,) = mended(directory, fit)
    module, factor = WRITERS[family] or ("", 0.0)
    solution = found[0][2]
    assert solution.suffix.endswith(f"{module}.weight")
    fitted, judged = InMemory(directory, module, texts(FITTED, 1)), InMemory(directory, module, texts(HELD, 2))
    expected = fitted.solved(factor, solution.penalty)
    ours = matrices[solution.suffix].double().numpy()
    ours = ours.T if fitted.is_transposed else ours
    away = np.linalg.norm(fitted.inputs @ (ours - expected).T)  # where inputs do not reach, rounding decides
    assert away < 1e-3 * np.linalg.norm(fitted.inputs @ (expected - fitted.matrix).T)
    assert done.before == pytest.approx(judged.error(factor, judged.matrix), rel=1e-4)
    assert done.after == pytest.approx(judged.error(factor, expected), rel=1e-3)
    assert done.after < done.before


@pytest.mark.parametrize("family", [name for name, writer in WRITERS.items() if writer is None])
def test_where_no_output_is_linear_in_a_matrix_none_is_solved_for(family: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=1.0)
    tried: list[Any] = []

    def fit(layer: FittedLayer, before: float) -> Any:
        tried.append(linear_fit(layer, before))

    (done,), matrices = mended(directory, fit)
    assert tried == [None]
    assert (done.how, done.after, matrices) == (None, done.before, [])


@pytest.mark.parametrize("cut", [CUT, (1, 2), (0,), (4, 5)])
def test_the_states_on_the_way_are_those_of_passes_of_their_own(cut: tuple[int, ...], tmp_path: Path) -> None:
    """What training end to end begins with, bit for bit: nothing of the source is run twice for it."""
    job = open_job(save_model(FAMILIES["llama"](), tmp_path / "m"), RunSettings(Compute("cpu", "float32")))
    model = job.model(plain_stream(job))
    layers = tuple(layer for layer in original_layers(6) if layer.base not in cut)
    batches = make_batches(texts(6, 1), 64), make_batches(texts(2, 2), 64)
    found = mend(model, layers, batches, How(lambda layer, before: None, lambda mended, matrices: {}, to_top=True))
    together = [*batches[0], *batches[1]]
    for ours, theirs in zip(found.top, teacher_states(model, together, (Scratch(), "teacher")), strict=True):
        assert torch.equal(ours, theirs)
    lowest = plan_climb(layers, 6).mended[0]
    if lowest:
        expected = states_above(model, Layers(layers[:lowest]), together, (Scratch(), "below"))
    else:
        expected = [recording.hidden_NTD for recording in model.record(together)]
    for ours, theirs in zip(found.entering, expected, strict=True):
        assert torch.equal(ours, theirs)
