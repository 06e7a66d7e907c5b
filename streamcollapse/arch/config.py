"""A checkpoint's ``config.json``: loaded through transformers, and cut to the layers that a plan keeps.

Knows which entries speak of layers. Knows nothing of weights.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from streamcollapse.arch.stored import TEXT_SECTIONS, refuse_quantised
from streamcollapse.errors import ModelError, printable
from streamcollapse.storage.index import CONFIG_FILE, read_json

# Lists that are never one entry per layer, however long they happen to be.
_NOT_PER_LAYER = {"architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"}

# Numbers of layers, 0-based, that have something the others have not.
_NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "hybrid_layer_ids",
    "ple_layer_ids",
    "full_attn_idxs",
)

# How many layers, from the lowest on, are of one kind; the rest are of another.
_LOWEST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "moe_layer_start_index")


def per_layer(key: str, value: Any, num_layers: int) -> bool:
    """Whether ``value`` is a list with one entry for each layer."""
    known = key in _NOT_PER_LAYER or key in _NUMBERS
    return isinstance(value, list) and len(value) == num_layers and not known


def cut(entries: Mapping[str, Any], num_layers: int, bases: Sequence[int]) -> dict[str, Any]:
    """Those of ``entries``, a config of ``num_layers`` layers, that are others if only ``bases`` are left."""
    edited: dict[str, Any] = {k: [v[b] for b in bases] for k, v in entries.items() if per_layer(k, v, num_layers)}
    for key in _NUMBERS:
        value = entries.get(key)
        if isinstance(value, list) and value:
            edited[key] = [position for position, base in enumerate(bases) if base in value]
    for key in _LOWEST:
        value = entries.get(key)
        if type(value) is int and 0 < value < num_layers:
            edited[key] = sum(base < value for base in bases)
    return edited | _without_period(entries, bases)


def _without_period(entries: Mapping[str, Any], bases: Sequence[int]) -> dict[str, Any]:
    """Every n-th layer is sparse, but for those in a list: the list says it all, once layers have gone."""
    step, dense = entries.get("decoder_sparse_step"), entries.get("mlp_only_layers")
    if type(step) is not int or step < 2 or not isinstance(dense, list):
        return {}
    positions = [position for position, base in enumerate(bases) if base in dense or (base + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": positions}


# What transformers and its validators raise for a config that they cannot use. Programming errors of ours do not pass
# through the calls that this guards.
_GENERAL = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
THEIR_ERRORS = (*_GENERAL, StrictDataclassError, TypeError, ValueError)


# Entries that make what a layer computes depend on its number, where it could only be judged at its old one.
_BY_NUMBER = ("scale_attn_by_inverse_layer_idx",)


@dataclass(frozen=True)
class ModelConfig:
    """``raw`` is the JSON as stored, ``loaded`` transformers' view of it, ``num_layers`` the decoder layers."""

    raw: dict[str, Any]
    loaded: PretrainedConfig
    num_layers: int

    @property
    def text(self) -> PretrainedConfig:
        """The part of the config that describes the decoder."""
        return self.loaded.get_text_config(decoder=True)

    @property
    def family(self) -> str:
        """Architecture class if the config names one, else the model type."""
        named = self.raw.get("architectures")
        return printable(named[0] if isinstance(named, list) and named else self.raw.get("model_type"))


def load_config(directory: Path, trust_remote_code: bool) -> ModelConfig:
    """Read and check ``directory/config.json``; code in the directory runs only with ``trust_remote_code``.

    Raises ModelError when the model is quantised, needs code that is not trusted, or is no decoder.
    """
    raw = read_json(directory / CONFIG_FILE)
    where = str(directory / CONFIG_FILE)
    if not isinstance(raw, dict):
        raise ModelError(f"{where}: not a JSON object; restore the checkpoint's config.json")
    refuse_quantised(where, raw)
    if not trust_remote_code and "auto_map" in raw and raw.get("model_type") not in _known_model_types():
        raise ModelError(
            f"{where}: model type {raw.get('model_type')} runs code of its own from the checkpoint; "
            "read that code, then pass `trust_remote_code`"
        )
    try:
        loaded = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except THEIR_ERRORS as error:
        raise ModelError(f"{where}: transformers cannot read it: {first_line(error)}") from error
    if getattr(loaded, "is_encoder_decoder", False):
        raise ModelError(f"{where}: {raw.get('model_type')} is an encoder-decoder model; give a decoder-only one")
    if loaded.model_type in _encoder_types() and not getattr(loaded, "is_decoder", False):
        raise ModelError(
            f"{where}: {loaded.model_type} is an encoder, whose attention sees both ways; "
            "give a decoder, which predicts the next token"
        )
    num_layers = getattr(loaded.get_text_config(decoder=True), "num_hidden_layers", None)
    if type(num_layers) is not int or num_layers < 1:
        raise ModelError(f"{where}: no usable number of decoder layers (num_hidden_layers is {num_layers!r})")
    for key in _BY_NUMBER:
        if getattr(loaded.get_text_config(decoder=True), key, False):
            raise ModelError(f"{where}: {key} is set: what a layer computes depends on its number; not supported")
    return ModelConfig(raw, loaded, num_layers)


def _known_model_types() -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING


def _encoder_types() -> set[str]:
    """Model types made for filling in masked tokens, even where transformers lets them predict the next one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def first_line(error: BaseException) -> str:
    """What ``error`` says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # what it leads up to follows
        return " ".join(lines)
    return lines[0] if lines else type(error).__name__


def pruned_config(config: ModelConfig, bases: Sequence[int]) -> dict[str, Any]:
    """The raw config with the layer count and every entry that speaks of layers cut to ``bases`` (0-based source
    layers).

    What transformers derives from the position of a layer (such as ``layer_types``) is written out where the derivation
    would give another result for the smaller stack.
    """
    edited = copy.deepcopy(config.raw)
    section = _text_section(edited)
    count_key = _count_key(config, section)
    section[count_key] = len(bases)
    section.update(cut(section, config.num_layers, bases))
    for key, value in cut(config.text.to_dict(), config.num_layers, bases).items():
        if key not in section and _derived(edited, section, key) != value:
            section[key] = value
    return edited


def as_pruned(config: ModelConfig, bases: Sequence[int]) -> ModelConfig:
    """``pruned_config`` as transformers reads it, without a file. Raises ModelError where it does not."""
    raw = pruned_config(config, bases)
    try:
        loaded = type(config.loaded).from_dict(copy.deepcopy(raw))
    except THEIR_ERRORS as error:
        raise ModelError(f"transformers cannot read the pruned model's config: {first_line(error)}") from error
    loaded._name_or_path = config.loaded._name_or_path  # where its code is, if it has its own
    return ModelConfig(raw, loaded, len(bases))


def _text_section(raw: dict[str, Any]) -> dict[str, Any]:
    for name in TEXT_SECTIONS:
        if isinstance(raw.get(name), dict):
            section: dict[str, Any] = raw[name]
            return section
    return raw


def _count_key(config: ModelConfig, section: dict[str, Any]) -> str:
    alias = config.text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return alias if alias in section or "num_hidden_layers" not in section else "num_hidden_layers"


def _derived(raw: dict[str, Any], section: dict[str, Any], key: str) -> Any:
    """What transformers would make of ``key`` for the edited config."""
    if raw.get("model_type") not in _known_model_types():
        return None  # code of the checkpoint's own: write the list out
    fields = {k: v for k, v in section.items() if k != "model_type"}
    model_type = section.get("model_type", raw.get("model_type"))
    return getattr(AutoConfig.for_model(model_type, **copy.deepcopy(fields)), key, None)
