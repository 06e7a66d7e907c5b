"""What the library says while it runs: plain events, sent to whoever listens. Knows nothing of terminals."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseStarted:
    """A phase (``reference``, ``search``, ``exchanges``, ``scales``, ``repair``, ``end to end``, ``repair check``,
    ``write``, ``perplexity``, ``evaluate``, ``generate``, ``held out``, ``samples``, ``speed``, ``teacher``,
    ``layers below``, ``heal``, ``convert``, ``verify``, ``recompute`` or ``fetch``) begins; ``total_steps`` are layers,
    tensors or models where known."""

    name: str
    total_steps: int | None = None


@dataclass(frozen=True)
class MemoryPlanned:
    """What each phase will hold, before any weight is read: rows of phase, what for, bytes and ``ram`` or ``vram``;
    ``budgets`` are the bytes that may be held of each."""

    needs: tuple[tuple[str, str, int, str], ...]
    budgets: dict[str, int]
    io: str


@dataclass(frozen=True)
class TimeExpected:
    """How long the job is expected to take on this machine: for each phase, in order, the seconds of its rounds, each
    with the candidates that it is expected to evaluate (0 where it is not a round of a search)."""

    phases: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase."""
        return {name: sum(seconds for seconds, _ in rounds) for name, rounds in self.phases}

    @property
    def total(self) -> float:
        """Seconds of the whole job."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class LayerDone:
    """One decoder layer was streamed through the forward pass; ``num_bytes`` were read for it. Of the ``seconds`` it
    took, the computation stood still for ``waiting``."""

    layer_index: int
    num_layers: int
    num_bytes: int
    seconds: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class StepDone:
    """A tensor was written or checked, or a file fetched, according to the phase."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class RoundStarted:
    """Round ``number``, from 1, of a search or of scales begins: of at most ``most``, with at most ``candidates`` (None
    where nobody knows). ``threshold``: what it tries, where rounds are tries of thresholds."""

    number: int
    most: int | None = None
    candidates: int | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class CandidatesDone:
    """``count`` more candidates are evaluated; ``best`` is the similarity of the most similar of them, None where none
    has one, or by the scout, whose similarities compare with no others."""

    count: int
    best: float | None


@dataclass(frozen=True)
class CandidateStarted:
    """A merge of 1-based layer ``pointer`` with its ``merged`` followers is about to be evaluated."""

    pointer: int
    merged: int
    threshold: float | None  # None: no threshold decides


@dataclass(frozen=True)
class StackChanged:
    """The stack after a decision, bottom first: how many source layers each cell covers."""

    cells: tuple[int, ...]


@dataclass(frozen=True)
class DecisionMade:
    """The outcome for the candidate started last; ``similarity`` is None where it could not be computed."""

    pointer: int
    merged: int
    similarity: float | None
    accepted: bool
    reason: str | None = None


@dataclass(frozen=True)
class StepLearned:
    """Step ``number`` of ``steps`` of healing was made, with ``loss``; ``judged``: that on held-out text when it was
    last asked for, ``best`` the least so far, after ``best_step`` steps. ``rate``: tokens a second."""

    number: int
    steps: int
    loss: float
    judged: float
    best: float
    best_step: int
    rate: float


@dataclass(frozen=True)
class NoteMade:
    """What the run will do, where the settings alone do not say it."""

    text: str


@dataclass(frozen=True)
class WarningRaised:
    """Something the user should know that does not stop the run."""

    text: str


Event = (
    PhaseStarted
    | MemoryPlanned
    | TimeExpected
    | LayerDone
    | StepDone
    | RoundStarted
    | CandidatesDone
    | CandidateStarted
    | StackChanged
    | DecisionMade
    | StepLearned
    | NoteMade
    | WarningRaised
)
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener that does nothing."""
