"""What runs chains of tasks: processes on this machine (local.py) or a Ray cluster (on_ray.py)."""

from dataclasses import dataclass
from typing import Protocol

from streamcollapse.batches.tasks import Chain
from streamcollapse.batches.worker import Message


@dataclass(frozen=True)
class FromChain:
    """``message`` came from the chain that was submitted as ``number``."""

    number: int
    message: Message


@dataclass(frozen=True)
class ChainEnded:
    """The chain ``number`` has come to its end, all of its tasks with it."""

    number: int


@dataclass(frozen=True)
class WorkerLost:
    """The worker of the chain ``number`` is gone, for the ``reason``: killed, out of memory, a mistake of ours."""

    number: int
    reason: str


Report = FromChain | ChainEnded | WorkerLost


class Engine(Protocol):
    """Runs chains side by side. Reports of one chain come in order."""

    def is_free(self) -> bool:
        """Whether another chain may be submitted now."""

    def submit(self, number: int, chain: Chain) -> None:
        """Run ``chain`` and call it ``number``."""

    def reports(self) -> list[Report]:
        """What has come in since the last call; waits a little if nothing has."""

    def close(self) -> None:
        """End what is still running, and let go of the workers."""
