"""Where a job is, from what it says: phase, round, candidates, the best so far, and what holds it up. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable

from streamcollapse.progress import (
    CandidatesDone,
    Event,
    LayerDone,
    PhaseStarted,
    RoundStarted,
    StepDone,
    StepLearned,
    TimeExpected,
)
from streamcollapse.units import format_about, format_bytes, format_seconds

MINUTE = 60.0
_PRIOR = 0.1  # of the job; for as long as that, what was expected counts as much as what was measured
_ALMOST = 0.95  # of a round that takes longer than expected
_TELLING = 3.0  # seconds of a phase, before it tells what is left
_FADING = 0.9  # of what layers before this one say of what is waited for


class Status:
    """The state of a job after the events so far; ``clock`` gives seconds since some moment."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = self._phase_began = clock()
        self._expected: TimeExpected | None = None
        self.phase: str | None = None
        self._total: int | None = None
        self._worked: set[tuple[str | None, int]] = set()  # rounds of phases, where something was not known before
        self._steps = 0
        self._at = ""
        self._num_bytes = 0
        self._round: RoundStarted | None = None
        self._done = 0
        self._best: float | None = None
        self._learned: StepLearned | None = None
        self._seconds = self._waiting = 0.0

    def listen(self, event: Event) -> None:
        """Take ``event`` into account."""
        if isinstance(event, CandidatesDone | LayerDone | StepDone):
            self._worked.add((self.phase, self._number))
        match event:
            case TimeExpected():
                self._expected = event
            case PhaseStarted(name, total):
                if self.phase is None:
                    self._began = self._clock()
                self.phase, self._total, self._phase_began = name, total, self._clock()
                self._steps = self._num_bytes = self._done = 0
                self._round = self._best = self._learned = None
                self._at, self._seconds, self._waiting = "", 0.0, 0.0
            case RoundStarted():
                self._round, self._done, self._best = event, 0, None
            case CandidatesDone(count, best):
                self._done += count
                if best is not None:
                    self._best = best if self._best is None else max(best, self._best)
            case LayerDone(index, count, num_bytes, seconds, waiting):
                self._steps, self._num_bytes = self._steps + 1, self._num_bytes + num_bytes
                self._at = f"layer {index + 1}/{count}"
                self._seconds = self._seconds * _FADING + seconds
                self._waiting = self._waiting * _FADING + waiting
            case StepLearned():
                self._learned = event
            case StepDone(_, num_bytes):
                self._steps, self._num_bytes = self._steps + 1, self._num_bytes + num_bytes

    @property
    def _number(self) -> int:
        return 1 if self._round is None else self._round.number

    @property
    def done(self) -> tuple[float, float | None]:
        """How much of the phase is done, of how much (None: nobody knows)."""
        if self._total is not None:
            return self._steps, self._total
        if self._round is not None and self._round.most is not None:
            return self._round.number - 1 + self._share_of_round(), self._round.most
        return self._share_of_round(), 1.0 if self._round is not None and self._round.candidates else None

    def _share_of_round(self) -> float:
        if self._round is None or not self._round.candidates:
            return 0.0
        return min(self._done / self._round.candidates, 1.0)

    def at(self) -> list[str]:
        """Where in the weights the phase is, what holds it up, and since when it runs."""
        elapsed, left = format_seconds(self._clock() - self._phase_began), self.remaining
        if left is not None:
            elapsed += f", {format_about(left)} left"
        return [part for part in (*self._step_words(), self._limit(), elapsed) if part]

    @property
    def remaining(self) -> float | None:
        """Seconds that are left: of the job, where it is known what it takes, else of a phase that has begun for long
        enough to tell. What was expected counts less, the longer it runs."""
        expected, (steps, total) = self._expected, self.done
        if expected is not None and self.phase in expected.seconds:
            parts = self._expected_so_far(expected)
            left, elapsed = expected.total - sum(parts.values()), self._clock() - self._began
            done, prior = sum(parts[part] for part in parts.keys() & self._worked), _PRIOR * expected.total
            return left * (elapsed + prior) / max(done + prior, 1e-9)
        elapsed = self._clock() - self._phase_began
        if self._total is None or total is None or steps <= 0 or elapsed < _TELLING:
            return None
        return elapsed * (total - steps) / steps

    def _expected_so_far(self, expected: TimeExpected) -> dict[tuple[str | None, int], float]:
        """The seconds that what is done was expected to take, by phase and round."""
        done = dict[tuple[str | None, int], float]()
        for name, rounds in expected.phases:
            now = self._number if name == self.phase else len(rounds) + 1
            done |= {(name, number): seconds for number, (seconds, _) in enumerate(rounds, 1) if number < now}
            if name == self.phase:
                if now <= len(rounds):
                    seconds, candidates = rounds[now - 1]
                    share = min(self._done / max(candidates, 1.0), _ALMOST)
                    done[name, now] = seconds * (share if self._total is None else min(self._steps / self._total, 1.0))
                break
        return done

    def summary(self) -> str:
        """What the phase took, now that it has come to its end."""
        size = format_bytes(self._num_bytes) if self._num_bytes else ""
        return f"{size}  {format_seconds(self._clock() - self._phase_began)}".strip()

    def round_words(self) -> str:
        """Which round, or try of a threshold, how many of its candidates are evaluated, and the best of them; or which
        step of healing, and what it comes to."""
        now = self._round
        if self._learned is not None:
            return learned_words(self._learned)
        if now is None:
            return ""
        if now.threshold is not None:
            return f"try {now.number}: threshold {now.threshold:.4f}"
        text = f"round {now.number}" + ("" if now.most is None else f" of at most {now.most}")
        if now.candidates is not None:
            text += f": {min(self._done, now.candidates)} of at most {now.candidates} candidates"
        return text + ("" if self._best is None else f", best {self._best:.4f}")

    def _step_words(self) -> list[str]:
        """The layer, or which of the steps, and what was read or written of them."""
        at = self._at
        if not at and self._total:
            at = f"{self._steps}/{self._total}"
        size = format_bytes(self._num_bytes) if self._num_bytes and self._total else ""
        return [at, size]

    def _limit(self) -> str:
        """What the last layers took their time with."""
        if not self._seconds:
            return ""
        return "reading" if self._waiting > self._seconds / 2 else "computing"

    def line(self) -> str:
        """The state in one line."""
        return ", ".join(part for part in (self.phase, self.round_words(), *self.at()) if part)


def learned_words(step: StepLearned) -> str:
    """How far healing is, and what it comes to."""
    best = "" if step.best == step.judged else f" (best {step.best:.4f} after {step.best_step})"
    return (
        f"step {step.number} of {step.steps}: {step.loss:.4f}, held out {step.judged:.4f}{best}, "
        f"{step.rate:.0f} tokens/s"
    )


def expected_words(expected: TimeExpected) -> str:
    """How long a job takes, and its phases, in words."""
    parts = ", ".join(f"{name} {format_seconds(round(seconds, 1))}" for name, seconds in expected.seconds.items())
    return f"{format_about(expected.total)} ({parts})"


class Minutes:
    """A line of the status a minute, for what is no terminal."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._status, self._write, self._clock = Status(clock), write, clock
        self._told = clock()

    def listen(self, event: Event) -> None:
        """Take ``event`` into account, and write where a minute has passed, or what takes more than that begins."""
        self._status.listen(event)
        if isinstance(event, TimeExpected) and event.total >= MINUTE:
            self._write(f"expected: {expected_words(event)}")
        if self._status.phase is not None and self._clock() - self._told >= MINUTE:
            self._told = self._clock()
            self._write(self._status.line())
