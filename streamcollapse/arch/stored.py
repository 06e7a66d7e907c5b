"""A checkpoint's ``config.json`` as it is stored, without transformers: in which precision the weights are."""

import json
import re
from collections.abc import Sequence
from typing import Any

import torch

from streamcollapse.errors import ModelError
from streamcollapse.storage.source import TensorSource

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


_ROWS_COMPARED = 64  # of two matrices that should be one
_PACKED = re.compile(r"\.(qweight|qzeros|g_idx|SCB|weight_packed|weight_scale|weight_scale_inv|absmax|quant_state.*)$")


def refuse_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ModelError for tensor ``name``, whose shape is not the one that the config gives."""
    raise ModelError(
        f"tensor {name} has shape {list(found)}, the config gives {list(expected)}; "
        "config.json and weights do not belong together"
    )


def refuse_integers(name: str, source: TensorSource) -> None:
    """Raise ModelError if the weight ``name`` is stored in integers."""
    dtype = source.info(name).dtype
    if not dtype.is_floating_point:
        raise ModelError(_packed(name, dtype))


def refuse_packed(source: TensorSource) -> None:
    """Raise ModelError if a tensor's name or dtype says that it is quantised."""
    for name in source.names:
        dtype = source.info(name).dtype
        eight_bit = dtype.is_floating_point and dtype.itemsize == 1
        if eight_bit or _PACKED.search(name) or (dtype == torch.int8 and len(source.info(name).shape) > 1):
            raise ModelError(_packed(name, dtype))


def refuse_different_twins(names: Sequence[str], source: TensorSource) -> None:
    """Raise ModelError if matrices that the config says are one are stored apart and differ, in a few of their rows."""
    first = names[0]
    rows = torch.linspace(0, source.info(first).shape[0] - 1, _ROWS_COMPARED).round().long()
    for other in {*names} - {first}:
        pair = [source.read_rows(name, rows).view(torch.uint8) for name in (first, other)]
        if not torch.equal(*pair):
            raise ModelError(
                f"the config says that head and embedding are tied, but {first} and {other} "
                "differ; set tie_word_embeddings in config.json to false if the model has a head of its own"
            )


def _packed(name: str, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    return f"tensor {name} is packed or quantised ({kind}); {use_instead(kind)}"
