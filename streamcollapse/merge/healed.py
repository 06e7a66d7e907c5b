"""What a plan says of healing: what was trained, on what, by which teacher, and what it brought. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from streamcollapse.errors import PlanError

_UNITS = {"kl": "divergence from the teacher", "nll": "loss", "mse": "distance from the teacher"}


@dataclass(frozen=True)
class HealRecord:
    """Healing by ``loss`` of what ``train`` says (``rank`` and ``alpha``: of adapters, else None), towards ``teacher``,
    whose checkpoint has that fingerprint.

    ``tokens`` of ``text``, whose ids have the digest ``text_sha256``, were learned from ``rounds`` times; what is kept
    is after ``best_step`` of ``steps`` steps of ``batch_tokens`` tokens at a largest ``rate``. ``before`` and
    ``after``: the loss on ``held_out_tokens`` of the same text.
    """

    train: str
    rank: int | None
    alpha: float | None
    loss: str
    temperature: float
    teacher: str
    teacher_fingerprint: str
    text: str
    text_sha256: str
    tokens: int
    held_out_tokens: int
    rounds: int
    batch_tokens: int
    rate: float
    steps: int
    best_step: int
    before: float
    after: float

    def in_words(self) -> str:
        """What came of it, in a line."""
        what = f"adapters of rank {self.rank}" if self.rank else self.train
        return (
            f"{what}, {self.best_step:,} steps on {self.tokens:,} tokens ({self.text}): {_UNITS[self.loss]} "
            f"{self.before:.4f} -> {self.after:.4f} on text that was not learned from"
        )

    def to_json(self) -> dict[str, Any]:
        """As a plan has it, made of JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> HealRecord:
        """Parse what ``to_json`` gave. Raises PlanError, naming the entry at fault."""
        try:
            return TypeAdapter(cls).validate_python(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise PlanError(f"heal.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
