"""What a plan says of its repair: how it was made, on what, and what came of each layer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from streamcollapse.errors import PlanError


@dataclass(frozen=True)
class RepairedLayer:
    """The layer at 0-based ``position`` of the pruned stack: ``how`` it was fitted (None: nothing helped), and the mean
    over held-out tokens of |output - target|^2 / |target|^2 ``before`` and ``after``."""

    position: int
    how: str | None
    before: float
    after: float


@dataclass(frozen=True)
class RepairRecord:
    """A repair by ``method`` on the ``tokens`` of ``text``, whose ids have the digest ``text_sha256``; ``loss_before``
    and ``loss_after`` in nats per token on ``held_out_tokens`` of the same text that nothing was fitted to. Unless it
    ``is_kept``, the layers are as they were."""

    method: str
    text: str
    text_sha256: str
    tokens: int
    held_out_tokens: int
    loss_before: float | None
    loss_after: float | None
    is_kept: bool
    layers: tuple[RepairedLayer, ...]

    def in_words(self) -> str:
        """What came of it, in a line."""
        if self.loss_before is None or self.loss_after is None:
            return f"nothing ({self.method}): no layer before a cut came nearer to what the source hands on"
        count = sum(layer.how is not None for layer in self.layers)
        losses = f"loss {self.loss_before:.4f} -> {self.loss_after:.4f} on text that was not fitted to"
        if not self.is_kept:
            return f"dropped ({self.method}): {losses}"
        return f"{count} layer{'s' * (count != 1)} by {self.method} on {self.tokens} tokens ({self.text}): {losses}"

    def to_json(self) -> dict[str, Any]:
        """As a plan has it, made of JSON types."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RepairRecord:
        """Parse what ``to_json`` gave. Raises PlanError, naming the entry at fault."""
        try:
            return TypeAdapter(cls).validate_python(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise PlanError(f"repair.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
