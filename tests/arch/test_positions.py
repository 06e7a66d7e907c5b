"""Config entries that speak of layers by position, and the proof on the pruned model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from streamcollapse import Checkpoint, Plan, SearchOptions, apply, search
from streamcollapse.arch.architecture import check_likeness
from streamcollapse.arch.config import cut, load_config, pruned_config
from streamcollapse.arch.skeleton import build_skeleton
from streamcollapse.arch.stored import config_text
from streamcollapse.errors import ModelError
from streamcollapse.jobs.prepare import prepare_search
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.progress import PhaseStarted
from streamcollapse.settings.run import Compute, RunSettings
from tests.checkpoints import save_model
from tests.families import SMALL


def test_each_kind_of_entry() -> None:
    entries = {
        "layer_types": ["a", "b", "c", "d"],
        "eos_token_id": [1, 2, 3, 4],
        "mlp_only_layers": [0, 3],
        "first_k_dense_replace": 2,
        "max_window_layers": 28,
        "num_experts": 4,
    }
    assert cut(entries, 4, [0, 2, 3]) == {
        "layer_types": ["a", "c", "d"],
        "mlp_only_layers": [0, 2],
        "first_k_dense_replace": 1,
    }
    every_layer = {"mlp_only_layers": [0, 1, 2, 3], "decoder_sparse_step": 1}
    assert cut(every_layer, 4, [1, 3]) == {"mlp_only_layers": [0, 1]}


def test_a_period_becomes_a_list() -> None:
    """Sparse is every layer i with (i + 1) % 2 == 0 that is not in the list: 3 and 5 of 0 to 5."""
    entries = {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    assert cut(entries, 6, [0, 1, 3, 4, 5]) == {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 3]}


def skeletons(config: hf.PretrainedConfig, bases: list[int], directory: Path) -> tuple:  # type: ignore[type-arg]
    config.save_pretrained(directory)
    loaded = load_config(directory, trust_remote_code=False)
    source = build_skeleton(loaded, torch.float32, trust_remote_code=False)
    (directory / "config.json").write_text(config_text(pruned_config(loaded, bases)))
    return source, build_skeleton(load_config(directory, False), torch.float32, False), bases


def test_moe_layers_of_a_period_stay_sparse(tmp_path: Path) -> None:
    config = hf.Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=2
    )
    source, pruned, bases = skeletons(config, [0, 1, 2, 5], tmp_path)
    check_likeness(source, pruned, bases)
    kinds = [type(layer.mlp).__name__ for layer in source.layers]
    assert len(set(kinds)) == 2
    assert [type(layer.mlp).__name__ for layer in pruned.layers] == [kinds[b] for b in bases]


def test_a_layer_that_would_be_of_another_kind_is_told(tmp_path: Path) -> None:
    """DiffLlama computes a constant of its attention from the layer's number; no config entry says it."""
    source, pruned, bases = skeletons(hf.DiffLlamaConfig(**SMALL), [0, 3, 4], tmp_path)
    with pytest.raises(ModelError, match=r"layer 1 of the pruned model would not be like layer 3.*lambda_init"):
        check_likeness(source, pruned, bases)


def test_attention_kinds_that_were_not_cut_are_told(tmp_path: Path) -> None:
    config = hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=8)
    source, pruned, _ = skeletons(config, [0, 1, 2, 5], tmp_path)
    check_likeness(source, pruned, [0, 1, 2, 5])
    with pytest.raises(ModelError, match="layer 3 of the pruned model would not be like layer 4"):
        check_likeness(source, pruned, [0, 1, 2, 4])


def test_gpt_2_that_scales_attention_by_the_layer_s_number_is_refused(tmp_path: Path) -> None:
    hf.GPT2Config(n_layer=4, n_embd=32, n_head=4, scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx is set"):
        load_config(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("dry", [False, True])
def test_such_an_architecture_is_refused_before_a_weight_is_read(tmp_path: Path, dry: bool) -> None:
    source = save_model(hf.DiffLlamaConfig(**SMALL), tmp_path / "m")
    options = SearchOptions(layers_per_merge=3, interval=1)
    with pytest.raises(ModelError, match="lambda_init"):
        if dry:
            prepare_search(source, options, RunSettings(Compute("cpu")))
        else:
            search(source, options, settings=RunSettings(compute=Compute("cpu")), listener=_no_phase)


def _no_phase(event: object) -> None:
    assert not isinstance(event, PhaseStarted)


def test_a_plan_by_hand_is_held_to_the_same(tmp_path: Path) -> None:
    """Names and shapes fit, so nothing but the comparison of layers can tell."""
    source = save_model(hf.DiffLlamaConfig(**SMALL), tmp_path / "m")
    fingerprint = Checkpoint(source).fingerprint()
    for bases, good in (((0, 1, 2), True), ((0, 1, 4), False)):
        plan = Plan("by hand", 6, fingerprint, tuple(PlanLayer(base, {base: 1.0}) for base in bases))
        if good:
            assert apply(source, plan, tmp_path / "good", settings=RunSettings(compute=Compute("cpu"))).plan == plan
        else:
            with pytest.raises(ModelError, match="layer 2 of the pruned model would not be like layer 4 of the source"):
                apply(source, plan, tmp_path / "bad", settings=RunSettings(compute=Compute("cpu")))
    assert not (tmp_path / "bad").exists()
