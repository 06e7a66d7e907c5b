"""A GGUF file as a TensorSource: dequantised tensor by tensor, under the names of a Hugging Face checkpoint.

Which tensor is which, what the converter of llama.cpp did to it, config and tokenizer are transformers' own knowledge;
the numbers are those of the ``gguf`` package. A tensor is, bit for bit, what transformers makes of it when it loads it
with the whole file.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import CONFIG_MAPPING, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from streamcollapse.arch.config import THEIR_ERRORS, ModelConfig, first_line
from streamcollapse.arch.skeleton import Skeleton, build_skeleton
from streamcollapse.arch.stored import config_text
from streamcollapse.errors import CheckpointError, ModelError, OptionError
from streamcollapse.storage.checkpoint import check_unchanged, fingerprint, state
from streamcollapse.storage.disk import disk_errors, write_whole
from streamcollapse.storage.header import ShardHeader, StoredTensor
from streamcollapse.storage.index import CONFIG_FILE
from streamcollapse.storage.source import TensorInfo

# By GGUF's own names. Each is tested against transformers; others may load there and come out wrong.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "qwen2moe", "qwen3moe")
_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # kinds that are no blocks of integers
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")


class GgufFile:
    """The model in the file ``path``, with weights in ``dtype`` (None: as stored, bfloat16 if they are quantised).

    Raises CheckpointError where the file cannot be read, ModelError for a model that is not supported, OptionError
    without the gguf package.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self.directory = path
        self._gguf, self._reader, parsed = _read(path)
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors}
        plain = next((_PLAIN[kind] for kind in _PLAIN if kind in kinds), torch.float32)
        self.dtype = dtype or (plain if kinds <= {*_PLAIN} else torch.bfloat16)
        self._kind = kind = str(self._reader.get_field("general.architecture").contents())
        if kind not in ARCHITECTURES or (kind == "llama" and any(map(_EXPERTS.match, self._stored))):
            what = f"{kind} with experts" if kind in ARCHITECTURES else kind
            raise ModelError(
                f"{path}: GGUF files of {what} are not supported, only those of {', '.join(ARCHITECTURES)}; use the "
                "original Hugging Face checkpoint"
            )
        self._skeleton = _skeleton(path, parsed["config"], self.dtype)
        self._processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=parsed["config"])
        self._parts: dict[str, tuple[str, int | None]] = {}  # by name: the stored tensor, and which expert of it
        self._infos: dict[str, TensorInfo] = {}
        self._match()

    def _match(self) -> None:
        """Find the stored tensor of each parameter of the model. Raises ModelError where there is none."""
        model, layers = self._skeleton.model, self._skeleton.layers_path
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # of tied ones the first
        mapping = get_gguf_hf_weights_map(model, self._processor, self._kind)
        for stored, tensor in self._stored.items():
            shape = tuple(int(size) for size in reversed(tensor.shape))
            if match := _EXPERTS.fullmatch(stored):
                for expert in range(shape[0]):
                    name = f"{layers}.{match[1]}.mlp.experts.{expert}.{match[2]}_proj.weight"
                    self._parts[name], self._infos[name] = (stored, expert), TensorInfo(self.dtype, shape[1:])
            elif (name := mapping.get(stored, "")) in shapes:
                self._parts[name], self._infos[name] = (stored, None), TensorInfo(self.dtype, shapes[name])
        for name in shapes:
            found = re.sub(r"(\.mlp\.experts\.).*", r"\g<1>0.down_proj.weight", name)  # held as one, stored one by one
            if found not in self._parts:
                raise ModelError(f"{self.directory}: holds no {name}; use the original Hugging Face checkpoint")

    @property
    def names(self) -> Sequence[str]:
        """In the order of the file."""
        return sorted(self._parts, key=lambda name: (self._stored[self._parts[name][0]].data_offset, self._parts[name]))

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """``name`` on ``device``, dequantised in float32 and rounded once."""
        stored, expert = self._parts[name]
        tensor = self._stored[stored]
        data = tensor.data if expert is None else tensor.data[expert]
        weights = self._gguf.dequantize(data, tensor.tensor_type)
        if expert is None:
            weights = self._processor.process(weights=weights, name=stored, tensor_key_mapping={}).weights
        shape = self._infos[name].shape
        return torch.from_numpy(numpy.array(weights)).to(self.dtype).reshape(shape).to(device)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.read(name, torch.device("cpu"))[rows]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(int(tensor.n_bytes) for tensor in self._stored.values())

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Bytes by kind of number, as GGUF calls it."""
        totals = Counter[str]()
        for tensor in self._stored.values():
            totals[tensor.tensor_type.name] += int(tensor.n_bytes)
        return dict(totals)

    @cached_property
    def _header(self) -> ShardHeader:
        about, first = self.directory.stat(), int(self._reader.data_offset)
        with self.directory.open("rb") as file:
            raw = file.read(first)
        tensors = {}
        for name, tensor in self._stored.items():
            start, size = int(tensor.data_offset), int(tensor.n_bytes)
            tensors[name] = StoredTensor(TensorInfo(torch.uint8, (size,)), start, start + size)
        return ShardHeader(self.directory, tensors, raw, about.st_size, about.st_mtime_ns)

    def fingerprint(self) -> str:
        """What tells this file from others, in hexadecimal; reads a few samples."""
        return fingerprint([self._header])

    def state(self, *beside: str) -> str:
        """What changes when the file does, in hexadecimal."""
        return state([self._header])

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file is not the one any more that was opened."""
        check_unchanged([self._header])

    def write_small_files(self, directory: Path) -> None:
        """Config and tokenizer, as transformers derives them. Raises OutputError, ModelError."""
        model = self._skeleton.model
        model.config.architectures = [type(model).__name__]
        document = model.config.to_diff_dict() | {"dtype": str(self.dtype).removeprefix("torch.")}
        write_whole(directory / CONFIG_FILE, config_text(document))
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory.parent, gguf_file=self.directory.name)
        except THEIR_ERRORS as error:
            raise ModelError(f"{self.directory}: its tokenizer cannot be used: {first_line(error)}") from error
        with disk_errors(directory):
            tokenizer.save_pretrained(directory)
            if model.can_generate():
                model.generation_config.save_pretrained(directory)


def _read(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The gguf package, its reader of the file ``path``, and what transformers makes of its metadata."""
    try:
        import gguf
    except ImportError as error:
        raise OptionError("GGUF files need the gguf package: pip install 'streamcollapse[gguf]'") from error
    try:
        return gguf, gguf.GGUFReader(path), load_gguf_checkpoint(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except THEIR_ERRORS as error:  # not the magic number, cut off, an architecture that transformers does not know
        raise CheckpointError(
            f"{path}: no GGUF file that can be used; it may be cut off, or of an architecture that transformers does "
            f"not read: {first_line(error)}"
        ) from error


def _skeleton(path: Path, config: dict[str, Any], dtype: torch.dtype) -> Skeleton:
    """The model that transformers' ``config`` for the file describes, without weights. Raises ModelError."""
    try:
        loaded = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    except THEIR_ERRORS as error:
        raise ModelError(f"{path}: transformers cannot read its config: {first_line(error)}") from error
    count = loaded.get_text_config(decoder=True).num_hidden_layers
    return build_skeleton(ModelConfig(loaded.to_dict(), loaded, count), dtype, trust_remote_code=False)
