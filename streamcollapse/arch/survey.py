"""What a checkpoint's names and its ``config.json`` say of a model, without its code: quick where both are usual."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamcollapse.errors import printable
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.index import CONFIG_FILE, read_json

_COUNTS = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
_IN_A_LAYER = re.compile(r"(.+?)\.(0|[1-9][0-9]{0,8})\.(.+)")


@dataclass(frozen=True)
class Survey:
    """The names of each decoder layer's tensors, bottom first, and of those ``outside`` that go into the output; the
    width of hidden states; rows of the vocabulary; elements of the input ``embedding``, of the ``head``, and of the
    parameters that one layer's module puts together from several tensors (experts): all, and the largest once more."""

    family: str
    model_type: str
    layers: Sequence[Sequence[str]]
    outside: Sequence[str]
    tied_head: bool
    hidden_size: int
    vocabulary: int
    embedding: int
    head: int
    fused: int = 0


def survey(checkpoint: Checkpoint) -> Survey | None:
    """The survey of a dense text model whose names count its layers; None for any other, and where config and names do
    not agree: then the model's own code has to be asked. Reads headers only."""
    raw = read_json(checkpoint.directory / CONFIG_FILE)
    if not isinstance(raw, dict) or not _is_usual(raw):
        return None
    (count, width, vocabulary, _), tied = (raw[key] for key in _COUNTS), raw["tie_word_embeddings"]
    layers: dict[int, list[str]] = {}
    outside, found = [], Counter[str]()
    for name in checkpoint.names:
        match = _IN_A_LAYER.fullmatch(name)
        if match is None:
            outside.append(name)
        else:
            layers.setdefault(int(match[2]), []).append(name)
            found[f"{match[1]} {match[3]}"] += 1
    infos = {name: checkpoint.info(name) for name in checkpoint.names}
    matrices = [infos[name].shape for name in outside if len(infos[name].shape) > 1]
    inner = {size for name in {*infos} - {*outside} for size in infos[name].shape}
    if not (
        sorted(layers) == list(range(count))
        and set(found.values()) == {count}
        and "expert" not in str([*found])
        and matrices == [(vocabulary, width)] * (1 if tied else 2)
        and all(info.dtype.is_floating_point and info.dtype.itemsize > 1 for info in infos.values())
        and raw.get("intermediate_size", width) in inner
    ):
        return None
    family, kind, size = printable(raw["architectures"][0]), raw["model_type"], vocabulary * width
    stack = [layers[i] for i in range(count)]
    return Survey(family, kind, stack, outside, tied, width, vocabulary, size, size)


def _is_usual(raw: dict[str, Any]) -> bool:
    """Whether the config is that of a text model which transformers knows, with weights as they are."""
    named, kind, spec = raw.get("architectures"), raw.get("model_type"), find_spec("transformers")
    counts = [*map(raw.get, _COUNTS), raw.get("num_key_value_heads", 1), (raw.get("pad_token_id") or 0) + 1]
    if spec is None or spec.origin is None or not isinstance(kind, str) or not kind.isidentifier():
        return False
    return (
        Path(spec.origin).with_name("models").joinpath(kind).is_dir()  # looked up, for importing it takes seconds
        and isinstance(named, list)
        and str(next(iter(named), "")).endswith("ForCausalLM")
        and all(type(count) is int and count > 0 for count in counts)
        and counts[-1] <= raw["vocab_size"]
        and isinstance(raw.get("tie_word_embeddings"), bool)
        and not {"auto_map", "quantization_config", "compression_config"} & raw.keys()
    )
