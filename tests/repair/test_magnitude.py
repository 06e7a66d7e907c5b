"""Magnitudes against transformers' own hidden states in memory: which tensors, and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamcollapse.forward.batches import make_batches
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.repair.layer import FittedLayer, Matrices
from streamcollapse.repair.magnitude import Magnitudes
from streamcollapse.repair.mend import How, Mended, mend
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Compute, RunSettings
from tests.checkpoints import save_model
from tests.families import FAMILIES
from tests.in_memory import find_layers
from tests.repair.test_linear import FITTED, HELD, texts
from tests.streams import plain_stream

STAY = (0, 2, 3, 5)  # of six layers: two cuts

# The tensors that write into the stream, as the model's code names them; None: no such.
WRITERS: dict[str, set[str] | None] = {
    "llama": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "qwen 3, norms on q and k": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "gpt 2, learned positions, tied": {
        "attn.c_proj.weight",
        "attn.c_proj.bias",
        "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    },
    "gpt neox, renamed head, parallel residual": {
        "attention.dense.weight",
        "attention.dense.bias",
        "mlp.dense_4h_to_h.weight",
        "mlp.dense_4h_to_h.bias",
    },
    "starcoder 2, biases": {"self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"},
    "granite, multipliers": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "mixtral, experts": None,  # of which each is stored by itself
    "gemma 3, two rotary bases": None,
    "olmo 2, norms after": None,
}


def scaled(directory: Path) -> tuple[list[Mended], list[Matrices], list[FittedLayer]]:
    job = open_job(directory, RunSettings(Compute("cpu", "float32")))
    stored, seen, fit = list[Matrices](), list[FittedLayer](), Magnitudes()

    def store(one: Mended, matrices: Matrices) -> dict[str, str]:
        if matrices:
            stored.append(matrices)
        return dict.fromkeys(matrices, "0" * 64)

    def fitted(layer: FittedLayer, before: float) -> Any:
        seen.append(layer)
        return fit(layer, before)

    batches = make_batches(texts(FITTED, 1), 64), make_batches(texts(HELD, 2), 64)
    layers = tuple(original_layers(6)[n] for n in STAY)
    return mend(job.model(plain_stream(job)), layers, batches, How(fitted, store, above=True)).done, stored, seen


def growths(directory: Path, writers: set[str]) -> list[float]:
    """Across the first cut, and across both, of the model with what is above the first scaled by that."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    token_ids = torch.tensor(texts(FITTED, 1) + texts(HELD, 2))
    with torch.no_grad():
        dense = model(token_ids, output_hidden_states=True, use_cache=False).hidden_states
        stack = find_layers(model)
        found = [float((dense[2].norm(dim=-1) / dense[1].norm(dim=-1)).mean())]
        for number in (2, 3):
            for name in writers:
                stack[number].get_parameter(name).div_(found[0])
        parent = next(module for module in model.modules() if stack in module.children())
        name = next(name for name, child in parent.named_children() if child is stack)
        setattr(parent, name, torch.nn.ModuleList(stack[n] for n in (0, 2, 3)))
        model.config.num_hidden_layers = 3
        states: list[torch.Tensor] = []
        stack[3].register_forward_hook(
            lambda module, args, output: states.append(output if torch.is_tensor(output) else output[0])
        )
        model(token_ids, use_cache=False)
    return [*found, float((dense[5].norm(dim=-1) / states[0].norm(dim=-1)).mean())]


@pytest.mark.parametrize("family", [name for name, writers in WRITERS.items() if writers is not None])
def test_what_layers_above_cuts_add_is_divided_by_the_growth(family: str, tmp_path: Path) -> None:
    directory, writers = save_model(FAMILIES[family](), tmp_path / "m", gain=1.0), WRITERS[family] or set()
    done, stored, seen = scaled(directory)
    assert [one.position for one in done] == [1, 2, 3]
    first, both = growths(directory, writers)
    for layer, matrices, growth in zip(seen, stored, (first, first, both), strict=True):
        suffixes = {layer.writable[name] for name in writers}
        assert {*matrices} == suffixes
        for suffix, value in matrices.items():
            torch.testing.assert_close(value, layer.weights.stored[suffix] / growth, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", [name for name, writers in WRITERS.items() if writers is None])
def test_where_no_tensors_do_nothing_but_write_nothing_is_scaled(family: str, tmp_path: Path) -> None:
    done, stored, _ = scaled(save_model(FAMILIES[family](), tmp_path / "m", gain=1.0))
    assert [one.how for one in done] == [None] * 3
    assert stored == []


def test_a_stack_without_its_top_has_nothing_above(tmp_path: Path) -> None:
    job = open_job(save_model(FAMILIES["llama"](), tmp_path / "m"), RunSettings(Compute("cpu", "float32")))
    batches = make_batches(texts(4, 1), 64), make_batches(texts(2, 2), 64)
    layers: tuple[PlanLayer, ...] = original_layers(6)[:4]
    found = mend(
        job.model(plain_stream(job)), layers, batches, How(Magnitudes(), lambda mended, matrices: {}, above=True)
    )
    assert (found.layers, found.done) == (layers, [])
