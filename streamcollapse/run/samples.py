"""Calibration and evaluation text: read, tokenised as the model's tokenizer does it, and told apart by a digest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from streamcollapse.arch.config import THEIR_ERRORS, first_line
from streamcollapse.errors import CalibrationError
from streamcollapse.forward.batches import Batch, call_tokens, make_batches
from streamcollapse.run.opened import Job
from streamcollapse.settings.run import SAMPLES, Calibration

_SHIPPED = {"sentences": "sentences.txt", "passages": "passages.jsonl"}


def load_samples(calibration: Calibration, default: str = "sentences") -> list[str]:
    """The samples in order; those of SAMPLES named ``default`` where ``calibration`` names none.

    Raises CalibrationError when there are none or the file cannot be read.
    """
    name = calibration.file or default
    if name in SAMPLES:
        with resources.as_file(resources.files("streamcollapse.data") / _SHIPPED[str(name)]) as shipped:
            return _load(shipped)
    return _load(Path(name))


def _load(path: Path) -> list[str]:
    text = read_text(path)
    if path.suffix.lower() == ".json":
        raise CalibrationError(f"{path}: give .txt with a sample a line, or .jsonl with a field text")
    samples = records(path, text) if path.suffix.lower() == ".jsonl" else _lines(text)
    if not samples:
        raise CalibrationError(f"{path}: no samples in it; write one sample a line")
    return samples


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises CalibrationError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def records(path: Path, text: str) -> list[str]:
    """The samples of ``text``, that of the .jsonl file ``path``. Raises CalibrationError."""
    samples = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}, line {number}: not JSON: {error}") from error
        sample = record.get("text") if isinstance(record, dict) else None
        if not isinstance(sample, str) or not sample.strip():
            raise CalibrationError(f'{path}, line {number}: no text in it; each line needs a non-empty "text"')
        if not sample.isprintable() and any("\ud800" <= c <= "\udfff" for c in sample):
            raise CalibrationError(f"{path}, line {number}: the text has half a surrogate pair; repair it")
        samples.append(sample)
    return samples


def load_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer. Raises CalibrationError when it has none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except THEIR_ERRORS as error:
        raise CalibrationError(f"{directory}: its tokenizer cannot be loaded: {first_line(error)}") from error


def tokenize(tokenizer: Any, samples: Sequence[str], max_tokens: int, vocabulary: int) -> list[list[int]]:
    """Token ids of each sample with the special tokens that the tokenizer adds, at most ``max_tokens``.

    Raises CalibrationError for a sample without tokens or with ids beyond the model's ``vocabulary``.
    """
    token_ids = [list(tokenizer(sample, verbose=False)["input_ids"][:max_tokens]) for sample in samples]
    for number, ids in enumerate(token_ids, 1):
        if not ids:
            raise CalibrationError(f"sample {number} has no tokens; remove it")
        check_vocabulary(ids, vocabulary)
    return token_ids


def check_vocabulary(token_ids: Sequence[int], vocabulary: int) -> None:
    """Raise CalibrationError when the tokenizer knows tokens that the model does not."""
    if max(token_ids, default=0) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives token {max(token_ids)}, but the model's vocabulary has {vocabulary}; "
            "tokenizer and weights do not belong together"
        )


def samples_digest(token_ids: Sequence[Sequence[int]]) -> str:
    """sha256 of the token ids of all samples, in hexadecimal: what the search was calibrated on."""
    return hashlib.sha256(json.dumps([list(ids) for ids in token_ids]).encode()).hexdigest()


def opening_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, usually BOS or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


@dataclass(frozen=True)
class Samples:
    """Calibration samples as the model takes them, and the digest that names them."""

    batches: list[Batch]
    digest: str

    @property
    def num_tokens(self) -> int:
        return sum(batch.input_ids_NT.numel() for batch in self.batches)

    @property
    def num_samples(self) -> int:
        return sum(len(batch.lengths) for batch in self.batches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(max(batch.lengths) for batch in self.batches)

    @property
    def largest_call(self) -> tuple[int, int]:
        """Rows and tokens a row of the largest call."""
        return max((tuple(b.input_ids_NT.shape) for b in self.batches), key=lambda shape: shape[0] * shape[1])  # type: ignore[return-value]


def calibration_samples(job: Job, calibration: Calibration, usual: str) -> Samples:
    """Load and tokenise the samples; without a file, the ``usual`` ones. Raises CalibrationError."""
    texts = load_samples(calibration, usual)
    tokenizer: Any = load_tokenizer(job.checkpoint.directory, job.trust_remote_code)
    limit = min(calibration.max_tokens, longest_context(job) or calibration.max_tokens)
    token_ids = tokenize(tokenizer, texts, limit, job.vocabulary)
    return Samples(make_batches(token_ids, call_tokens(job.width)), samples_digest(token_ids))


def longest_context(job: Job) -> int | None:
    """The most tokens the model takes at once, where its config says so."""
    limit = getattr(job.architecture.config.text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
