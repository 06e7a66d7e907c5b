"""Many sequences in one row: what they share at their beginnings is computed once, and nothing is padded.

A row is a tree of tokens: each has a position and, but for the first of a sequence, the token before it. It attends to
those before it in its own sequence alone. Whether the code of a family takes such calls is found by trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.errors import ModelError, is_of_device
from streamcollapse.forward.batches import MOST_CALL_TOKENS, Batch, make_batches
from streamcollapse.forward.by_position import CallsByPosition, MadeCalls, alone
from streamcollapse.forward.model import LayerWeights, StreamedModel

AGREE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest output
TRIAL_TOKENS = 10
_TRIAL = ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 7, 8), (9, 1, 2))  # which of them, in three sequences


@dataclass
class PackedRow:
    """Tokens with their positions, each after the one with the number ``before`` (-1: none). ``columns`` are where the
    tokens of a sequence are, by its number."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    columns: dict[int, list[int]] = field(default_factory=dict)

    def add(self, number: int, sequence: Sequence[int], shared: Sequence[int]) -> None:
        """Sequence ``number``, which begins with the tokens in columns ``shared``."""
        path = list(shared)
        for position in range(len(shared), len(sequence)):
            self.before.append(path[-1] if path else -1)
            path.append(len(self.token_ids))
            self.token_ids.append(sequence[position])
            self.positions.append(position)
        self.columns[number] = path

    def tree(self) -> torch.Tensor:
        """Which tokens each attends to: itself and all before it in its sequence. [T, T], bool"""
        count = len(self.token_ids)
        found_TT = torch.eye(count, dtype=torch.bool)
        for column, before in enumerate(self.before):  # a token stands after the one before it
            if before >= 0:
                found_TT[column] |= found_TT[before]
        return found_TT


def pack(sequences: Sequence[Sequence[int]], most: int) -> list[PackedRow]:
    """``sequences`` of token ids in rows of at most ``most`` tokens, or of one sequence; in order of their ids, so that
    those which begin alike stand together, and one that another begins with takes no room at all."""
    rows, last = list[PackedRow](), -1
    for number in sorted(range(len(sequences)), key=lambda n: tuple(sequences[n])):
        sequence = sequences[number]
        shared = 0 if last < 0 else _alike(sequences[last], sequence)
        if not rows or len(rows[-1].token_ids) + len(sequence) - shared > most:
            rows.append(PackedRow())
            shared = 0
        begin = rows[-1].columns[last][:shared] if shared else []
        rows[-1].add(number, sequence, begin)
        last = number
    return rows


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _calls(calls: CallsByPosition, row: PackedRow) -> Sequence[LayerCall]:
    """How layers are called for ``row``; what its tokens attend to is kept as bits."""
    positions = torch.tensor(row.positions, device=calls.device)
    count, tree = len(row.positions), np.packbits(row.tree().numpy())

    def made(base: int) -> LayerCall:
        attends_TT = torch.from_numpy(np.unpackbits(tree, count=count * count)).to(calls.device).bool()
        return calls.at(base, positions, positions, attends_TT.view(count, count))

    return MadeCalls(len(calls), made)


def packed_entry(
    model: StreamedModel, row: PackedRow, sequences: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, Sequence[LayerCall]]:
    """What enters layer 0 for ``row``, of these ``sequences``, [1, T, D]; and how layers are called for it. Raises
    ValueError where that cannot be told."""
    longest = max(row.columns, key=lambda n: len(sequences[n]))
    hidden_1TD: torch.Tensor | None = None
    for batch, numbers in _rows(sequences, row.columns):
        found = model.record([batch])[0]
        if hidden_1TD is None:
            hidden_1TD = found.hidden_NTD.new_empty(1, len(row.token_ids), found.hidden_NTD.shape[-1])
        for n, number in enumerate(numbers):
            columns = torch.tensor(row.columns[number], device=hidden_1TD.device)
            hidden_1TD[0, columns] = found.hidden_NTD[n, : len(columns)]
    assert hidden_1TD is not None
    return hidden_1TD, _calls(CallsByPosition.of(model, sequences[longest]), row)


def _rows(sequences: Sequence[Sequence[int]], numbers: Iterable[int]) -> Iterator[tuple[Batch, list[int]]]:
    """Those of ``sequences`` with ``numbers`` in batches, and the numbers of the rows of each."""
    longest_first = sorted(numbers, key=lambda n: -len(sequences[n]))  # as batches have them
    ordered = iter(longest_first)
    for batch in make_batches([sequences[n] for n in longest_first], MOST_CALL_TOKENS):
        yield batch, [next(ordered) for _ in batch.lengths]


def takes_packed(model: StreamedModel, base: int, weights: LayerWeights, token_ids: Sequence[int]) -> bool:
    """Whether source layer ``base``, with ``weights``, gives for a packed row what it gives for its sequences. Tried
    with TRIAL_TOKENS ``token_ids``."""
    sequences = [[token_ids[n] for n in some] for some in _TRIAL]
    (row,) = pack(sequences, 1 << 10)
    try:
        hidden_1TD, calls = packed_entry(model, row, sequences)
        together = model.run(base, weights, hidden_1TD, calls[base])[0]
        singly = list[torch.Tensor]()
        for sequence in sequences:
            one = model.record([alone(sequence)])[0]
            singly.append(model.run(base, weights, one.hidden_NTD, one.calls[base])[0])
    except (ModelError, RuntimeError, ValueError, TypeError, IndexError) as error:
        if is_of_device(error):
            raise
        return False
    allowed = AGREE[model.placement.dtype] * max(float(one.abs().max()) for one in singly)
    return all(bool((together[row.columns[number]] - one).abs().max() <= allowed) for number, one in enumerate(singly))
