from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamcollapse.arch.architecture import load_architecture
from streamcollapse.errors import PlanError
from streamcollapse.merge import mixing
from streamcollapse.merge.mixing import mix_into, mix_tensors
from streamcollapse.merge.plan import Plan, PlanLayer, original_layers
from streamcollapse.merge.view import MergedView, check_plan, mismatch
from streamcollapse.storage.checkpoint import Checkpoint
from tests.checkpoints import edit_tensors, save_llama
from tests.methods import unchanged

CPU = torch.device("cpu")


def test_accumulated_in_float32_and_rounded_once() -> None:
    # In bfloat16 256 + 1 is 256; only the last of three additions would survive stepwise rounding.
    big, one = torch.tensor([256.0]).bfloat16(), torch.tensor([1.0]).bfloat16()
    mixed = mix_tensors([(1.0, big), (1.0, one), (1.0, one)], torch.bfloat16)
    assert mixed.item() == 258.0
    assert ((big + one) + one).item() == 256.0


def test_no_argument_is_written_to_and_a_plain_copy_is_the_tensor_itself() -> None:
    a, b = torch.ones(3), torch.full((3,), 2.0)
    assert mix_tensors([(1.0, a)], torch.float32) is a
    assert torch.equal(mix_tensors([(-1.0, a), (2.0, b)], torch.float32), torch.full((3,), 3.0))
    assert torch.equal(a, torch.ones(3))
    assert torch.equal(b, torch.full((3,), 2.0))
    assert mix_tensors([(1.0, a.double()), (1e-12, a.double())], torch.float64)[0].item() == 1 + 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_pieces_do_not_change_a_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    terms = [(c, torch.randn(37, 11, generator=g).to(dtype)) for c in (-2.0, 1.0, 1 / 3, 0.7)]
    whole = mix_tensors(terms, dtype)
    monkeypatch.setattr(mixing, "_PIECE_ELEMENTS", 13)
    pieces = torch.empty(37, 11, dtype=torch.float64)
    mix_into(pieces, terms, dtype)
    assert torch.equal(pieces.to(dtype), whole)
    assert torch.equal(pieces, whole.double()), "rounded to the weights' own dtype before anything else"


def _view(directory: Path, layers: list[PlanLayer], norms: bool = False) -> MergedView:
    checkpoint = Checkpoint(directory)
    return MergedView(checkpoint, load_architecture(checkpoint).layout, layers, norms)


def test_the_original_stack_is_the_checkpoint_itself(llama: Path) -> None:
    view = _view(llama, list(original_layers(8)))
    tensors = load_file(llama / "model.safetensors")
    assert sorted(view.names) == sorted(tensors)
    assert all(torch.equal(view.read(name, CPU), tensors[name]) for name in view.names)


@pytest.mark.parametrize("norms", [False, True])
def test_a_mixed_layer(llama: Path, norms: bool) -> None:
    tensors = load_file(llama / "model.safetensors")
    view = _view(llama, [PlanLayer(5, {5: -1.0, 6: 1.0, 7: 1.0})], norms)
    assert [n for n in view.names if "layers" in n] == list(view.layer_names(0).values())
    for suffix, name in view.layer_names(0).items():
        assert name == f"model.layers.0.{suffix}"
        five, six, seven = (tensors[f"model.layers.{i}.{suffix}"] for i in (5, 6, 7))
        expected = five if "norm" in suffix and not norms else (-five + six) + seven
        assert torch.equal(view.read(name, CPU), expected), name
        assert view.info(name).shape == tuple(five.shape)
    assert torch.equal(view.read("lm_head.weight", CPU), tensors["lm_head.weight"])


def test_unlike_layers_do_not_mix(tmp_path: Path) -> None:
    directory = save_llama(tmp_path / "m", num_layers=3)
    name = "model.layers.1.mlp.up_proj.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(50, 32)

    edit_tensors(directory, widen)
    checkpoint = Checkpoint(directory)
    layout = load_architecture(checkpoint).layout
    reason = "mlp.up_proj.weight is [48, 32] float32 in source layer 0, [50, 32] float32 in source layer 1"
    assert mismatch(checkpoint, layout, PlanLayer(0, {0: 0.5, 1: 0.5})) == reason
    assert mismatch(checkpoint, layout, PlanLayer(0, {1: 1.0})) == reason
    assert mismatch(checkpoint, layout, PlanLayer(0, {0: 0.5, 2: 0.5})) is None
    assert mismatch(checkpoint, layout, PlanLayer(1, {1: 1.0})) is None
    plan = Plan("m", 3, checkpoint.fingerprint(), (PlanLayer(0, {0: 0.5, 1: 0.5}),))
    with pytest.raises(PlanError, match=r"layers\[0\] cannot be merged: mlp.up_proj"):
        check_plan(plan, checkpoint.fingerprint(), checkpoint, layout)


def test_a_plan_of_another_source_is_refused(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    layout = load_architecture(checkpoint).layout
    check_plan(unchanged("x", 8, checkpoint.fingerprint()), checkpoint.fingerprint(), checkpoint, layout)
    with pytest.raises(PlanError, match="made for another source"):
        check_plan(unchanged("x", 8, "0" * 64), checkpoint.fingerprint(), checkpoint, layout)
    with pytest.raises(PlanError, match="for a source of 9 layers, this one has 8"):
        check_plan(unchanged("x", 9, checkpoint.fingerprint()), checkpoint.fingerprint(), checkpoint, layout)
