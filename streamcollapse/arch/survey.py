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
from streamcollapse.storage.index import CONFIG_FILE, is_file, read_json

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
    path = checkpoint.directory / CONFIG_FILE
    raw = read_json(path) if is_file(path) else None
    if not isinstance(raw, dict) or not _is_usual(raw):
        return None
    count, width, vocabulary = raw["num_hidden_layers"], raw["hidden_size"], raw["vocab_size"]
    layers: dict[int, list[str]] = {}
    outside, found = [], Counter[str]()
    for name in checkpoint.names:
        match = _IN_A_LAYER.fullmatch(name)
        if match is None:
            outside.append(name)
        else:
            layers.setdefault(int(match[2]), []).append(name)
            found[f"{match[1]} {match[3]}"] += 1
    matrices = [name for name in outside if len(checkpoint.info(name).shape) > 1]
    whole = sorted(layers) == list(range(count)) and set(found.values()) == {count} and "expert" not in str([*found])
    tables = all(checkpoint.info(name).shape == (vocabulary, width) for name in matrices)
    dtypes = all(checkpoint.info(name).dtype.itemsize > 1 for name in checkpoint.names)
    if not (whole and tables and dtypes and len(matrices) == (1 if raw["tie_word_embeddings"] else 2)):
        return None
    family, size = printable(raw["architectures"][0]), vocabulary * width
    stack = [layers[i] for i in range(count)]
    return Survey(family, raw["model_type"], stack, outside, raw["tie_word_embeddings"], width, vocabulary, size, size)


def _is_usual(raw: dict[str, Any]) -> bool:
    """Whether the config is that of a text model which transformers knows, with weights as they are."""
    named, kind, spec = raw.get("architectures"), raw.get("model_type"), find_spec("transformers")
    counts = [raw.get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")]
    if spec is None or spec.origin is None or not isinstance(kind, str) or not kind.isidentifier():
        return False
    return (
        Path(spec.origin).with_name("models").joinpath(kind).is_dir()  # looked up, for importing it takes seconds
        and isinstance(named, list)
        and str(next(iter(named), "")).endswith("ForCausalLM")
        and all(type(count) is int and count > 0 for count in counts)
        and isinstance(raw.get("tie_word_embeddings"), bool)
        and not {"auto_map", "quantization_config", "compression_config"} & raw.keys()
    )
