"""A checkpoint's ``config.json`` as it is stored, without transformers: in which precision the weights are."""

from __future__ import annotations

import json
from typing import Any

from streamcollapse.errors import ModelError

CONFIG_FILE = "config.json"
TEXT_SECTIONS = ("text_config", "llm_config", "language_config")
_DTYPE_KEYS = ("dtype", "torch_dtype")

# Quantisations in which models are published without any others, and what makes plain weights of them.
_DEQUANTISED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config", "float8": "FineGrainedFP8Config"}


def use_instead(method: str) -> str:
    """What to do with weights that are quantised by ``method`` (as transformers calls it, or a dtype)."""
    advice = "use the original 16-bit weights, and quantise the result"
    kind = next((name for start, name in _DEQUANTISED.items() if method.startswith(start)), None)
    if kind is None:
        return advice
    return f"{advice}; where there are none, load these with {kind}(dequantize=True) in transformers and save them"


def refuse_quantised(where: str, raw: dict[str, Any]) -> None:
    """Raise ModelError where the config at ``where`` says that the weights are packed."""
    for section in (raw, *(raw.get(name) for name in TEXT_SECTIONS)):
        if not isinstance(section, dict):
            continue
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                method = section[key].get("quant_method", "unknown") if isinstance(section[key], dict) else "unknown"
                raise ModelError(f"{where}: the checkpoint is quantised ({key}: {method}); {use_instead(str(method))}")


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The raw ``config`` of the same model with weights in ``dtype``, in whatever entries it says so."""
    edited = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    for key in _DTYPE_KEYS:
        if isinstance(edited.get(key), str):
            edited[key] = dtype
    return edited


def config_text(document: dict[str, Any]) -> str:
    """``document`` as transformers would lay it out in ``config.json``."""
    return json.dumps(document, indent=2, sort_keys=True) + "\n"
