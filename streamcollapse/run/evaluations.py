"""Evaluated candidates by what they are: for one run, or in a journal for another one as well."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamcollapse.merge.plan import StackKey
from streamcollapse.settings.catalogue import METRICS
from streamcollapse.storage.disk import Journal

EvaluationKey = tuple[str, StackKey]  # by which metric (after "/" on how many tokens), of what stack


@dataclass(frozen=True)
class Evaluation:
    """What came of a candidate; ``reason`` says why where there is no similarity."""

    similarity: float | None
    reason: str | None = None


class Memory:
    """Evaluated candidates, for one run."""

    def __init__(self) -> None:
        self._known: dict[EvaluationKey, Evaluation] = {}

    def get(self, key: EvaluationKey) -> Evaluation | None:
        return self._known.get(key)

    def add(self, found: Mapping[EvaluationKey, Evaluation]) -> None:
        self._known.update(found)


class JournalMemory(Memory):
    """Those in ``journal`` as well: keyed by a digest of metric and mixes, on the disk before they are used."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal
        self._digests = dict(filter(None, map(_parsed, journal.records)))

    def get(self, key: EvaluationKey) -> Evaluation | None:
        return super().get(key) or self._digests.get(_digest(key))

    def add(self, found: Mapping[EvaluationKey, Evaluation]) -> None:
        super().add(found)
        self._journal.append(
            [
                {"kind": "evaluated", "metric": key[0], "stack": _digest(key)[1]}
                | {"similarity": one.similarity, "reason": one.reason}
                for key, one in found.items()
            ]
        )


def _parsed(record: Mapping[str, Any]) -> tuple[tuple[str, str], Evaluation] | None:
    """What a record says, if it is one of an evaluation and can be: what cannot be is evaluated again."""
    metric, stack = record.get("metric"), record.get("stack")
    if record.get("kind") != "evaluated" or not isinstance(stack, str) or not isinstance(metric, str):
        return None
    known = METRICS.get(metric.partition("/")[0])
    if known is None:
        return None
    similarity, reason = record.get("similarity"), record.get("reason")
    sound = (
        isinstance(similarity, int | float) and not isinstance(similarity, bool) and -1.0 <= similarity <= known.highest
    )
    if (sound and reason is None) or (similarity is None and isinstance(reason, str)):
        return (metric, stack), Evaluation(similarity, reason)
    return None


def _digest(key: EvaluationKey) -> tuple[str, str]:
    metric, stack = key
    return metric, hashlib.sha256(repr(stack).encode()).hexdigest()
