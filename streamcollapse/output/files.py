"""The small files of a checkpoint that a pruned one keeps: tokenizer, generation settings, licence, trusted code."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from streamcollapse.storage.disk import disk_errors
from streamcollapse.storage.index import TEMPLATES, is_beside

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
    kept = [p for p in directory.iterdir() if p.is_file() and any(fnmatch(p.name, k) for k in patterns)]
    return sorted([*kept, *_templates(directory)])


def every_file_beside(directory: Path) -> list[Path]:
    """Every file of ``directory`` that ``is_beside`` its weights, sorted. Python files too: nothing runs them."""
    files = [*(p for p in directory.iterdir() if p.is_file()), *_templates(directory)]
    return sorted(p for p in files if is_beside(p.relative_to(directory).as_posix()))


def _templates(directory: Path) -> list[Path]:
    """Chat templates beside the first one, which have a folder of their own."""
    return [p for p in directory.glob(f"{TEMPLATES}/*.jinja") if p.is_file()]


def copy_files(files: list[Path], source: Path, directory: Path) -> None:
    """Copy ``files`` of ``source`` byte for byte into ``directory``. Raises OutputError."""
    for file in files:
        target = directory / file.relative_to(source)
        with disk_errors(target):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
