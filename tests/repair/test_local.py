"""Local fits against plain Adam on the model's own layer in memory; and solving block by block against all at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamcollapse.repair import local
from streamcollapse.repair.layer import FittedLayer
from streamcollapse.repair.linear import linear_fit
from streamcollapse.repair.local import RATE, local_fit
from tests.checkpoints import save_model
from tests.families import FAMILIES
from tests.in_memory import find_layers
from tests.repair.test_linear import CUT, FITTED, mended

TRAINED = (
    "llama",
    "gemma 3, two rotary bases",
    "gpt 2, learned positions, tied",
    "falcon, alibi",
    "mistral, sliding",
    "olmo 2, norms after",
)


def by_hand(directory: Path, batches: list[torch.Tensor], rounds: int) -> dict[str, torch.Tensor]:
    """Every matrix of the layer before the cut after ``rounds`` of Adam, by the formulas of the module's text."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layer = find_layers(model)[CUT[0] - 1]
    trained = {name: p for name, p in layer.named_parameters() if p.dim() > 1}
    sizes = [float(p.detach().square().mean().sqrt()) for p in trained.values()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        wanted = [model(ids, output_hidden_states=True, use_cache=False).hidden_states[CUT[1] + 1] for ids in batches]
    for parameter in trained.values():
        parameter.requires_grad_(True)
    adam = torch.optim.Adam([{"params": [p]} for p in trained.values()], betas=(0.9, 0.95))
    generator, step = torch.Generator().manual_seed(local._SEED), 0
    for _ in range(rounds):
        for which in torch.randperm(len(batches), generator=generator).tolist():
            share = min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / (rounds * len(batches))))
            for group, size in zip(adam.param_groups, sizes, strict=True):
                group["lr"] = RATE * size * share
            found: list[torch.Tensor] = []
            hook = layer.register_forward_hook(
                lambda module, args, output, found=found: found.append(output if torch.is_tensor(output) else output[0])
            )
            model(batches[which], use_cache=False)
            hook.remove()
            away = (found[0] - wanted[which]).square().sum(-1) / wanted[which].square().sum(-1)
            adam.zero_grad()
            away.mean().backward()
            adam.step()
            step += 1
    return {name: p.detach() for name, p in trained.items()}


@pytest.mark.parametrize("family", TRAINED)
def test_a_local_fit_is_what_adam_makes_of_the_model_s_own_layer(family: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=1.0)
    found: list[FittedLayer] = []

    def fit(layer: FittedLayer, before: float) -> Any:
        fitted = local_fit(layer, math.inf, rounds=2)
        assert fitted is not None
        found.append(fitted.layer)
        return fitted.layer, "local", fitted.error

    mended(directory, fit)
    batches = [batch.input_ids_NT for batch in found[0].fit.batches]
    assert sum(map(len, batches)) == FITTED
    expected = by_hand(directory, batches, rounds=2)
    parameters = {name: found[0].weights.parameters[name] for name in found[0].writable}
    assert {name for name, value in parameters.items() if value.dim() > 1} == {*expected}
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, atol=2e-5, rtol=1e-3)


def test_a_local_fit_that_does_not_help_is_none(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=1.0)
    tried: list[Any] = []

    def fit(layer: FittedLayer, before: float) -> Any:
        tried.append(local_fit(layer, 0.0, rounds=1))

    ((done,), stored) = mended(directory, fit)
    assert tried == [None]
    assert stored == []
    assert done.after == done.before


def test_block_by_block_comes_near_to_all_at_once(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=1.0)
    errors: dict[int | None, float] = {}

    def fit(layer: FittedLayer, before: float) -> Any:
        for block in (None, 48, 16):
            found = linear_fit(layer, before, block)
            assert found is not None
            errors[block] = found.error / before

    mended(directory, fit)
    assert errors[48] == errors[None]  # 48 are all
    assert errors[None] < errors[16] < 1.0
    assert errors[16] - errors[None] < 0.25 * (1.0 - errors[None])
