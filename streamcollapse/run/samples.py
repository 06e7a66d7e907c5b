"""Calibration and evaluation text: read, tokenised as the model's tokenizer does it, and told apart by a digest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from streamcollapse.arch.config import THEIR_ERRORS, first_line
from streamcollapse.errors import CalibrationError
from streamcollapse.forward.batches import Batch, make_batches
from streamcollapse.run.opened import Job
from streamcollapse.run.text_names import is_of_hub
from streamcollapse.run.texts import each_document
from streamcollapse.settings.run import SAMPLES, Calibration

_SHIPPED = {"sentences": "sentences.txt", "passages": "passages.jsonl"}
_OF_HUB = 128  # samples of a dataset, its first


def load_samples(calibration: Calibration, default: str = "sentences", tokenizer: Any = None) -> list[str]:
    """The samples in order; those of SAMPLES named ``default`` where ``calibration`` names none. Conversations become
    samples by the template of ``tokenizer``.

    Raises CalibrationError when there are none or they cannot be read.
    """
    name = calibration.file or default
    if name in SAMPLES:
        with resources.as_file(resources.files("streamcollapse.data") / _SHIPPED[str(name)]) as shipped:
            return list(each_document(shipped, tokenizer, by_line=True))
    if str(name).lower().endswith(".json"):
        raise CalibrationError(f"{name}: give .txt with a sample a line, or .jsonl with a field text")
    samples = list(islice(each_document(name, tokenizer, by_line=True), _OF_HUB if is_of_hub(name) else None))
    if not samples:
        raise CalibrationError(f"{name}: no samples in it; write one sample a line")
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
    tokenizer: Any = load_tokenizer(job.checkpoint.directory, job.trust_remote_code)
    texts = load_samples(calibration, usual, tokenizer)
    limit = min(calibration.max_tokens, longest_context(job) or calibration.max_tokens)
    token_ids = tokenize(tokenizer, texts, limit, job.vocabulary)
    return Samples(make_batches(token_ids, job.call_tokens), samples_digest(token_ids))


def longest_context(job: Job) -> int | None:
    """The most tokens the model takes at once, where its config says so."""
    limit = getattr(job.architecture.config.text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
