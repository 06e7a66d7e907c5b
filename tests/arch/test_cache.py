"""What a sequence adds to memory, by the config: what the model's own cache holds after reading that many tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from streamcollapse.arch.cache import cache_elements
from streamcollapse.arch.config import ModelConfig
from streamcollapse.errors import ModelError
from tests.families import FAMILIES, MORE_FAMILIES

CONTEXT = 24  # longer than the windows
REFUSED = {  # they keep something else than keys and values
    "deepseek 3, latent attention, dense first": "kv_lora_rank",
    "jamba, state space": "mamba_d_state",
    "qwen 3 next, linear attention": "layers of kind linear_attention",
}


def _counted(config: Any) -> tuple[int, ...]:
    return cache_elements(ModelConfig({}, config, config.num_hidden_layers), CONTEXT)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE_FAMILIES])
def test_as_the_models_own_cache(name: str) -> None:
    config = (FAMILIES | MORE_FAMILIES)[name]()
    if name in REFUSED:
        with pytest.raises(ModelError, match=f"{REFUSED[name]}.* cannot be counted; give `target_layers`"):
            _counted(config)
        return
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        kept = model(torch.arange(2, 2 + CONTEXT).unsqueeze(0), use_cache=True).past_key_values
    if not hasattr(kept, "layers"):
        pytest.skip("this version of transformers has a cache of its own for it")
    for found, layer in zip(_counted(config), kept.layers, strict=True):
        tokens = layer.keys.shape[-2]
        assert tokens in (CONTEXT, 7)  # transformers keeps one less than a window of 8
        each = (layer.keys.numel() + layer.values.numel()) // tokens
        if name == "falcon, new decoder":  # its code stores each of two heads once for each of the four that read them
            each //= 2
        assert found == each * (CONTEXT if tokens == CONTEXT else 8)


def test_kinds_and_configs_that_say_nothing() -> None:
    mixed = FAMILIES["llama"]()
    mixed.layer_types = ["full_attention", "conv"] * 3
    with pytest.raises(ModelError, match="layers of kind conv keep cannot be counted"):
        _counted(mixed)

    class Bare(PretrainedConfig):
        num_hidden_layers = 2

    with pytest.raises(ModelError, match="names no heads"):
        _counted(Bare())
