"""What healing brings down: how far the student's next tokens are from the teacher's, or from the text.

    kl    Kullback-Leibler divergence of the student's next-token distributions from the teacher's, at a temperature
          whose square is a factor (Hinton et al. 2015)
    nll   negative log likelihood of the text
    mse   |student - teacher|^2 / |teacher|^2 of the last hidden states, after the final norm

Each is a mean over the tokens of a step, or over one in so many of them, in nats for the first two. Logits are made of
a few tokens at a time, and what is computed of them of a part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from streamcollapse.forward.batches import Batch, logits_tokens
from streamcollapse.forward.head import Head, inner, log_sum, within
from streamcollapse.forward.model import StreamedModel, Weights

_Found = tuple[float, torch.Tensor | None]  # a loss, and its gradient


@dataclass(frozen=True)
class Judge:
    """``loss`` by name, of what leaves the top layer of ``student``; by ``teacher`` with what left the top of its own.
    ``heads`` of both over the same ``vocabulary``, the student's first. ``every``: one in so many tokens of a row
    counts, since with a large vocabulary the head takes longer than all layers. ``learned``: masters of weights of the
    student's head, which has them as tensors of its own."""

    loss: str
    student: StreamedModel
    teacher: StreamedModel
    heads: tuple[Head, Head]
    vocabulary: int
    temperature: float = 1.0
    every: int = 1
    learned: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def refresh(self) -> None:
        """The student's head is as its masters are now."""
        for name, master in self.learned.items():
            self.heads[0].put(name, master)

    def places(self, batch: Batch, turn: int) -> list[range]:
        """The tokens of each row of ``batch`` that count: from another first one in each ``turn``. The last of a row
        has no next one to be likely."""
        less = 1 if self.loss == "nll" else 0
        return [range(turn % self.every, length - less, self.every) for length in batch.lengths]

    def loss_of(
        self,
        batch: Batch,
        places: Sequence[range],
        left_NTD: torch.Tensor,
        teacher_NTD: torch.Tensor | None,
        tokens: int,
        gradient: bool,
    ) -> _Found:
        """What ``batch`` adds to the mean loss over ``tokens``, of which those at ``places`` are, and with ``gradient``
        that by ``left_NTD``, [N, T, D]. ``teacher_NTD`` left the teacher's top layer; ``nll`` needs none."""
        total, found = 0.0, torch.zeros_like(left_NTD) if gradient else None
        # the logits of both are held: as many as two blocks of a search in float32
        size = 2 * logits_tokens(self.vocabulary, self.student.placement.grain)
        size = min(size, *(head.tokens for head in self.heads))
        counted = [(row, place) for row, some in enumerate(places) for place in some]
        for first in range(0, len(counted), size):
            some = torch.tensor(counted[first : first + size]).unbind(1)
            if self.loss == "nll":
                wanted = batch.input_ids_NT[some[0], some[1] + 1]
            else:
                assert teacher_NTD is not None
                wanted = teacher_NTD[some]
            there = some[0].to(left_NTD.device), some[1].to(left_NTD.device)
            part = left_NTD[there].detach().requires_grad_(gradient)
            way = self._by_states if self.loss == "mse" else self._by_words
            loss, by_part = way(part, wanted.to(part.device), tokens)
            if found is not None:
                assert by_part is not None
                found[there] = by_part.to(found.dtype)
            total += loss
        return total, found

    def _by_states(self, left_TD: torch.Tensor, wanted_TD: torch.Tensor, tokens: int) -> _Found:
        with torch.no_grad():
            theirs = self.teacher.last_hidden(wanted_TD[None])[0].float()
        with torch.set_grad_enabled(left_TD.requires_grad):
            ours = self.student.last_hidden(left_TD[None])[0].float()
            loss = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-30)).sum() / tokens
        found = torch.autograd.grad(loss, left_TD)[0] if left_TD.requires_grad else None
        return float(loss.detach()), found

    def _by_words(self, left_TD: torch.Tensor, wanted: torch.Tensor, tokens: int) -> _Found:
        """sum p (log p - log q) / tokens, without log p where p is the next token itself; its gradient by a student's
        logit is (q - p) / tokens. At a temperature times that, as the divergence is times its square."""
        is_text, heat = self.loss == "nll", 1.0 if self.loss == "nll" else self.temperature
        parts = list(self.heads[0].parts(len(left_TD)))
        ours, theirs, made_with = list[torch.Tensor](), list[torch.Tensor](), list[Weights]()
        our_sum = their_sum = None
        for words in parts:
            made_with.append(self._leaves(self.heads[0].weights(words), left_TD.requires_grad))
            with torch.set_grad_enabled(left_TD.requires_grad):
                ours.append(self.heads[0].logits(left_TD, words, made_with[-1]))
            our_sum = log_sum(our_sum, _at(ours[-1].detach(), heat))
            if not is_text:
                with torch.no_grad():
                    theirs.append(self.heads[1].logits(wanted, words))
                their_sum = log_sum(their_sum, _at(theirs[-1], heat))
        assert our_sum is not None
        total = torch.zeros((), dtype=torch.float64, device=left_TD.device)
        found = torch.zeros(left_TD.shape, device=left_TD.device) if left_TD.requires_grad else None
        for number, words in enumerate(parts):
            log_q = _logs(ours[number].detach(), our_sum, heat)
            if their_sum is None:
                p = _is_next(wanted, words, log_q)
                total -= inner(p, log_q)
            else:
                log_p = _logs(theirs[number], their_sum, heat)
                p = log_p.exp()
                total += inner(p, log_p.sub_(log_q))
            if found is not None:
                by_logits = log_q.exp_().sub_(p).mul_(heat / tokens)
                leaves = [left_TD, *(made_with[number][name] for name in self.learned)]
                by_left, *by_weights = torch.autograd.grad(ours[number], leaves, by_logits.to(ours[number].dtype))
                found += by_left.float()
                self._add(words, by_weights)
        return float(total) * heat**2 / tokens, found

    def _leaves(self, weights: Weights, gradient: bool) -> Weights:
        """``weights`` of the student's head, those that are learned as leaves that gradients are taken of."""
        learned = {name: weights[name].detach().requires_grad_(gradient) for name in self.learned}
        return {**weights, **learned}

    def _add(self, words: slice, gradients: Sequence[torch.Tensor]) -> None:
        """Add to the gradients of the masters those of a part of the vocabulary."""
        for (name, master), gradient in zip(self.learned.items(), gradients, strict=True):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad[self.heads[0].rows(name, words)] += gradient


def _at(logits: torch.Tensor, heat: float) -> torch.Tensor:
    return logits.float() if heat == 1.0 else logits.float() / heat


def _logs(logits_TW: torch.Tensor, sum_T: torch.Tensor, heat: float) -> torch.Tensor:
    """The logarithms of probabilities, a tensor of its own."""
    return _at(logits_TW, heat) - sum_T.float().unsqueeze(-1)


def _is_next(wanted_T: torch.Tensor, words: slice, like_TW: torch.Tensor) -> torch.Tensor:
    """1 where the next token is that of ``words``, else 0. [T, words]"""
    at_T, is_here_T = within(words, wanted_T)
    return torch.zeros_like(like_TW).scatter_(1, at_T.unsqueeze(1), is_here_T.to(like_TW.dtype).unsqueeze(1))
