"""The files beside a checkpoint's weights, by name: tokenizer, config, templates, licence, code."""

from __future__ import annotations

from fnmatch import fnmatch

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
