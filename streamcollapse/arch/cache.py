"""How much a sequence adds to memory where a model generates: its keys and values, from the config alone."""

from typing import Any

from streamcollapse.arch.config import ModelConfig
from streamcollapse.errors import ModelError

# Kinds of layers, as transformers' ``layer_types`` has them, whose keys and values are those of every token, and those
# that keep a window of them.
_WHOLE = ("full_attention", "attention")
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# Entries of models that keep something else than keys and values, in the whole stack or in some layers.
_OTHER = ("mamba_d_state", "ssm_cfg", "state_size", "kv_lora_rank", "num_kv_shared_layers", "attn_layer_indices")


def cache_elements(config: ModelConfig, context: int) -> tuple[int, ...]:
    """The elements of the keys and values that each layer keeps of one sequence of ``context`` tokens.

    Raises ModelError where the config does not say it in one of the usual ways.
    """
    text = config.text
    for key in _OTHER:
        if getattr(text, key, None):
            raise ModelError(f"{config.family} ({key}): what it keeps of a sequence cannot be counted; {_INSTEAD}")
    heads, size = _heads(config), _head_size(config)
    kinds = getattr(text, "layer_types", None) or [_usual_kind(text)] * config.num_layers
    return tuple(2 * heads * size * _tokens(config, kind, context) for kind in kinds)


_INSTEAD = "give `target_layers`"


def _heads(config: ModelConfig) -> int:
    """Heads of keys and values."""
    text = config.text
    nested = getattr(text, "attn_config", None)
    if (grouped := _number(nested, "kv_n_heads")) is not None:
        return grouped
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    for key in ("num_key_value_heads", "num_kv_heads", "num_attention_heads"):
        if (found := _number(text, key)) is not None:
            return found
    raise ModelError(f"{config.family}: its config names no heads, so its cache cannot be counted; {_INSTEAD}")


def _head_size(config: ModelConfig) -> int:
    text = config.text
    if (found := _number(text, "head_dim")) is not None:
        return found
    width, heads = _number(text, "hidden_size"), _number(text, "num_attention_heads")
    if width is None or heads is None:
        raise ModelError(f"{config.family}: its config names no heads, so its cache cannot be counted; {_INSTEAD}")
    return width // heads


def _number(config: Any, key: str) -> int | None:
    value = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
    return value if type(value) is int and value > 0 else None


def _usual_kind(text: Any) -> str:
    """What all layers are where the config lists no kinds."""
    windowed = _number(text, "sliding_window") is not None and getattr(text, "use_sliding_window", True)
    return "sliding_attention" if windowed else "full_attention"


def _tokens(config: ModelConfig, kind: str, context: int) -> int:
    if kind in _WHOLE:
        return context
    if kind not in _WINDOWS:
        raise ModelError(f"{config.family}: what its layers of kind {kind} keep cannot be counted; {_INSTEAD}")
    window = _number(config.text, _WINDOWS[kind])
    return context if window is None else min(window, context)
