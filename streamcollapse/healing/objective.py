"""What healing brings down: how far the student's next tokens are from the teacher's, or from the text.

    kl    Kullback-Leibler divergence of the student's next-token distributions from the teacher's, at a temperature
          whose square is a factor (Hinton et al. 2015)
    nll   negative log likelihood of the text
    mse   |student - teacher|^2 / |teacher|^2 of the last hidden states, after the final norm

Each is a mean over the tokens of a step, in nats for the first two. Logits are made of so many tokens at a time as a
search makes of them, so that no block of tokens times vocabulary is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from streamcollapse.forward.batches import Batch, logits_tokens
from streamcollapse.forward.model import StreamedModel, Weights


@dataclass(frozen=True)
class Judge:
    """``loss`` by name, of what leaves the top layer of ``student``; by ``teacher`` with what left the top of its own.
    ``heads``: the weights of both, the student's first; of ``vocabulary`` rows."""

    loss: str
    student: StreamedModel
    teacher: StreamedModel
    heads: tuple[Weights, Weights]
    vocabulary: int
    temperature: float = 1.0

    def tokens(self, batches: Sequence[Batch]) -> int:
        """How many tokens of ``batches`` count: the last of a row has no next one to be likely."""
        less = 1 if self.loss == "nll" else 0
        return sum(length - less for batch in batches for length in batch.lengths)

    def loss_of(
        self, batch: Batch, left_NTD: torch.Tensor, teacher_NTD: torch.Tensor | None, tokens: int, gradient: bool
    ) -> tuple[float, torch.Tensor | None]:
        """What ``batch`` adds to the mean loss over ``tokens``, and with ``gradient`` that by ``left_NTD``, [N, T, D].
        ``teacher_NTD`` left the teacher's top layer; ``nll`` needs none."""
        counted = [(row, length - (self.loss == "nll")) for row, length in enumerate(batch.lengths)]
        if self.loss == "nll":
            rows = [batch.input_ids_NT[row, 1 : count + 1] for row, count in counted]
        else:
            assert teacher_NTD is not None
            rows = [teacher_NTD[row, :count] for row, count in counted]
        total, found = 0.0, torch.zeros_like(left_NTD) if gradient else None
        size = logits_tokens(self.vocabulary)
        for (row, count), wanted in zip(counted, rows, strict=True):
            for first in range(0, count, size):
                chunk = slice(first, min(first + size, count))
                part = left_NTD[row : row + 1, chunk].detach().requires_grad_(gradient)
                with torch.set_grad_enabled(gradient):
                    loss = self._chunk(part, wanted[chunk].to(part.device)) / tokens
                if found is not None:
                    loss.backward()  # type: ignore[no-untyped-call]
                    found[row, chunk] = part.grad[0]  # type: ignore[index]
                total += float(loss.detach())
        return total, found

    def _chunk(self, left_1TD: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if self.loss == "mse":
            ours = self.student.last_hidden(left_1TD)[0].float()
            with torch.no_grad():
                theirs = self.teacher.last_hidden(wanted[None])[0].float()
            return ((ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-30)).sum()
        logits = self.student.logits(self.heads[0], left_1TD)[0].float()
        if self.loss == "nll":
            return functional.cross_entropy(logits, wanted, reduction="sum")
        with torch.no_grad():
            theirs = self.teacher.logits(self.heads[1], wanted[None])[0].float() / self.temperature
            log_teacher = functional.log_softmax(theirs, dim=-1)
        log_student = functional.log_softmax(logits / self.temperature, dim=-1)
        kl = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return kl * self.temperature**2
