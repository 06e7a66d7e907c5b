"""What a source is, a directory or an id on the Hub, and which shards a directory has: a single file, or an index that
maps names to shards."""

import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from streamcollapse.errors import CheckpointError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
MAX_JSON_BYTES = 100_000_000  # of a config or an index
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
FORMATS = ((SINGLE_FILE, INDEX_FILE), (TORCH_FILE, TORCH_INDEX_FILE))  # the first one found counts


def is_hub_id(source: str | Path) -> bool:
    """Whether ``source`` names a checkpoint on the Hub: it looks like one, and nothing here has that name."""
    return HUB_ID.fullmatch(str(source)) is not None and not os.path.lexists(source)


def is_gguf(source: str | Path) -> bool:
    """Whether ``source`` is a GGUF file, by its name."""
    return Path(source).suffix == ".gguf" and is_file(Path(source))


def local_path(source: str | Path) -> Path | None:
    """``source`` as a path; None where it is on the Hub."""
    return None if is_hub_id(source) else Path(source)


def find_shards(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Shard file names of a checkpoint, sorted, and the index's ``weight_map`` (None for a single file).

    Of a checkpoint in both formats, the safetensors. Raises CheckpointError when the directory holds no checkpoint or
    its index is unusable.
    """
    if not directory.is_dir():
        what = "is a file; give the directory of the checkpoint" if directory.exists() else "does not exist"
        if directory.is_file() and directory.suffix in (".gguf", ".pth"):
            what = what_is_there([str(directory)])
        raise CheckpointError(f"{directory}: {what}")
    for single, index in FORMATS:
        if (directory / single).is_file():
            return [single], None
        if (directory / index).is_file():
            weight_map = shards_of_index(directory / index)
            return sorted(set(weight_map.values())), weight_map
    raise CheckpointError(f"{directory}: {what_is_there([entry.name for entry in directory.iterdir()])}")


def is_file(path: Path) -> bool:
    """Whether ``path`` is an existing file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> Any:
    """The JSON document at ``path``. Raises CheckpointError when it cannot be read or parsed."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, over the limit of {MAX_JSON_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def shards_of_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of the index at ``path``, from tensor names to files beside it. Raises CheckpointError."""
    document = read_json(path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map from tensor names to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(f"{path}: tensor {name} is mapped to {shard}, not to a file")
        parts = PurePosixPath(shard.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in shard:
            raise CheckpointError(
                f"{path}: tensor {name} is mapped to {shard}, "
                "outside the checkpoint's directory; download the index again"
            )
    return weight_map


def what_is_there(files: Iterable[str]) -> str:
    """Why ``files`` are no checkpoint that can be used, and what would be."""
    found = sorted(files)
    if "adapter_config.json" in found:
        return "an adapter (LoRA) and no model; merge it into its base model first (merge_and_unload in peft)"
    if special := [name for pair in FORMATS for name in pair if name in found]:
        return f"{special[0]} is no file that can be read, or a link that leads nowhere; restore it"
    if any(name.endswith(".safetensors") for name in found):
        return f"safetensors files, but neither {SINGLE_FILE} nor {INDEX_FILE}; restore the index"
    if any(fnmatch(name, "consolidated*.pth") for name in found):
        return "Meta's own format (consolidated.*.pth); use the Hugging Face version of the model in safetensors"
    if any(name.endswith((".bin", ".pth", ".pt")) for name in found):
        return f"PyTorch files, but neither {TORCH_FILE} nor {TORCH_INDEX_FILE}; restore the index, or rename the file"
    if any(name.endswith(".gguf") for name in found):
        file = next(name for name in found if name.endswith(".gguf"))
        return f"a GGUF file; make a checkpoint of it: streamcollapse convert {file} `out=DIR`"
    return f"no {SINGLE_FILE}, no {TORCH_FILE} and no index of either; give the directory of a Hugging Face checkpoint"


TEMPLATES = "additional_chat_templates"  # a folder of more chat templates

_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt*",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.msgpack.index.json",
    "*.onnx*",
)


def is_beside(file: str) -> bool:
    """Whether ``file``, a path inside the checkpoint's directory, is neither weights of any format nor hidden."""
    if file.startswith(".") or any(fnmatch(file, pattern) for pattern in _WEIGHTS):
        return False
    return "/" not in file or fnmatch(file, f"{TEMPLATES}/*.jinja")
