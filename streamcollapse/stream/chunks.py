"""What a pass over the weights reads, in which pieces and for how long each is needed. Pure: no bytes are touched."""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Chunk:
    """Tensors that are loaded together for step ``first`` of a pass and held until the end of step ``last``, or for
    good if they are to ``stay``."""

    names: tuple[str, ...]
    first: int
    last: int
    stay: bool = False


def plan_chunks(
    steps: Sequence[Sequence[str]], size: Callable[[str], int], capacity: int, keep: Container[str] = ()
) -> list[Chunk]:
    """Chunks for a pass whose step i needs the tensors ``steps[i]``, in the order in which they are needed.

    Those in ``keep`` are to stay. Each tensor is in one chunk: it is read once and held from its first use to its last.
    A chunk holds at most ``capacity`` bytes as ``size`` counts them, unless it is a single tensor. Tensors of different
    length of life are kept apart, so that what is needed longer does not hold up the rest.
    """
    last: dict[str, int] = {}
    for number, names in enumerate(steps):
        last.update(dict.fromkeys(names, number))
    chunks: list[Chunk] = []
    seen: set[str] = set()
    for number, names in enumerate(steps):
        groups: dict[tuple[int, bool], list[str]] = {}
        for name in dict.fromkeys(names):
            if name not in seen:
                seen.add(name)
                stay = name in keep
                groups.setdefault((number if stay else last[name], stay), []).append(name)
        for (end, stay), group in sorted(groups.items()):
            chunks += [Chunk(part, number, end, stay) for part in _within(group, size, capacity)]
    return chunks


def _within(names: Sequence[str], size: Callable[[str], int], capacity: int) -> list[tuple[str, ...]]:
    parts: list[list[str]] = []
    filled = 0
    for name in names:
        if not parts or filled + size(name) > capacity:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size(name)
    return [tuple(part) for part in parts]


def most_held(chunks: Sequence[Chunk]) -> int:
    """How many chunks that do not stay are held at once, at most."""
    change: Counter[int] = Counter()
    for chunk in chunks:
        if not chunk.stay:
            change[chunk.first] += 1
            change[chunk.last + 1] -= 1
    return max(accumulate(change[step] for step in sorted(change)), default=0)
