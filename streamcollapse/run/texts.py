"""Documents to learn from or to judge by: of one file, of all that a pattern matches, or of a dataset of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamcollapse.arch.config import THEIR_ERRORS, first_line
from streamcollapse.errors import CalibrationError
from streamcollapse.run.text_names import HUB, is_of_hub, matching, read_text

_MOST_CHARACTERS = 1 << 26  # of all documents together
_EXTRA = "pip install 'streamcollapse[datasets]'"


def documents(pattern: str | Path, tokenizer: Any) -> list[str]:
    """Each .txt file (or file of another name) is a document; each line of a .jsonl file is one, by its ``text``, or by
    its ``messages`` in the chat template of ``tokenizer``; so is each row of a .parquet file, or of a dataset of the
    Hub. Files in order of their names; of all of them the first 64 million characters.

    Raises CalibrationError where nothing matches ``pattern``, or a file is not what it should be.
    """
    found, held = list[str](), 0
    for document in each_document(pattern, tokenizer):
        found.append(document)
        held += len(document)
        if held > _MOST_CHARACTERS:
            return found
    if not any(document.strip() for document in found):
        raise CalibrationError(f"{pattern}: no text in it")
    return found


def each_document(pattern: str | Path, tokenizer: Any, by_line: bool = False) -> Iterator[str]:
    """The documents of ``documents``, one after the other; ``by_line``: each line of a .txt file is one. Raises
    CalibrationError."""
    if is_of_hub(pattern):
        yield from _on_hub(str(pattern), tokenizer)
        return
    for path in matching(pattern):
        yield from _in_file(path, tokenizer, by_line)


def _in_file(path: Path, tokenizer: Any, by_line: bool) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _rows(path, tokenizer)
    elif suffix == ".jsonl":
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CalibrationError(f"{where}: not JSON: {error}") from error
                yield _said_by(record, where, tokenizer)
    elif by_line:
        yield from (line.strip() for line in read_text(path).split("\n") if line.strip())
    else:
        yield read_text(path)


def _rows(path: Path, tokenizer: Any) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise CalibrationError(f"{path}: reading it takes pyarrow: {_EXTRA}") from None
    try:
        with ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            if not columns:
                raise CalibrationError(f"{path}: no column text or messages in it, only {_listed(file)}")
            number = 0
            for batch in file.iter_batches(columns=columns[:1]):
                for record in batch.to_pylist():
                    number += 1
                    yield _said_by(record, f"{path}, row {number}", tokenizer)
    except (OSError, ArrowException) as error:
        raise CalibrationError(f"{path}: cannot be read: {first_line(error)}") from error


def _on_hub(name: str, tokenizer: Any) -> Iterator[str]:
    """The rows of a dataset, as they come over the network: no more of it than is taken."""
    which, split, column = ([*name.removeprefix(HUB).split(":"), "", ""])[:3]
    owner, _, rest = which.partition("/")
    title, _, config = rest.partition("/")
    if not owner or not title or name.count(":") > 3:
        raise CalibrationError(f"{name}: is no dataset; give hub:org/name[/config][:split[:column]]")
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(f"{name}: reading it takes datasets: {_EXTRA}") from None
    try:
        rows = load_dataset(f"{owner}/{title}", config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            where = f"{name}, row {number}"
            if column and column not in row:
                raise CalibrationError(f"{where}: no column {column} in it, only {', '.join(row)}")
            yield _said_by({"text": row[column]} if column else row, where, tokenizer)
    except THEIR_ERRORS as error:
        raise CalibrationError(f"{name}: cannot be read: {first_line(error)}") from error


def _listed(file: Any) -> str:
    return ", ".join(file.schema_arrow.names[:8])


def _said_by(record: Any, where: str, tokenizer: Any) -> str:
    """The text of ``record``, which is at ``where``."""
    text = record.get("text") if isinstance(record, dict) else None
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and messages and text is None:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except THEIR_ERRORS as error:
            raise CalibrationError(f"{where}: the chat template does not take it: {first_line(error)}") from error
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError(f'{where}: no text in it; each needs a non-empty "text", or "messages"')
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise CalibrationError(f"{where}: the text has half a surrogate pair; repair it")
    return text
