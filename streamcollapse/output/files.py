"""The small files of a checkpoint that a pruned one keeps: tokenizer, generation settings, licence, trusted code."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from streamcollapse.storage.writer import disk_errors

KEPT = (
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def companion_files(directory: Path, with_code: bool) -> list[Path]:
    """Files of ``directory`` that the output keeps, sorted; Python files only ``with_code``."""
    patterns = (*KEPT, "*.py") if with_code else KEPT
    return sorted(p for p in directory.iterdir() if p.is_file() and any(fnmatch(p.name, k) for k in patterns))


def copy_files(files: list[Path], directory: Path) -> None:
    """Copy ``files`` byte for byte into ``directory``. Raises OutputError."""
    for file in files:
        with disk_errors(directory / file.name):
            shutil.copyfile(file, directory / file.name)
