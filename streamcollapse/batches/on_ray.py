"""Chains of tasks on a Ray cluster: one that is there, or a local one that is started and ended here.

Every machine of a cluster must see the sources and the results under the same paths. A task asks for the GPU, the
processor and the memory that it needs; Ray decides where and when it runs.
"""

import os
import re
import socket
import warnings
from dataclasses import replace
from typing import Any

from streamcollapse.batches.tasks import Chain
from streamcollapse.batches.worker import ChainEnded, FromChain, Machine, Message, Place, Report, WorkerLost, run_chain
from streamcollapse.errors import DeviceError, OptionError, printable

_POLL_SECONDS = 0.3
_CONNECT_SECONDS = 10.0


class _Mailbox:
    """Keeps messages until the driver takes them."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Message]] = []

    def put(self, number: int, message: Message) -> None:
        self._items.append((number, message))

    def take(self) -> list[tuple[int, Message]]:
        taken, self._items = self._items, []
        return taken


def _run(mailbox: Any, number: int, chain: Chain, place: Place, machine: Machine) -> None:
    """What a Ray task does."""
    import ray

    warnings.simplefilter("ignore")
    pending: list[Any] = []

    def tell(message: Message) -> None:
        pending.append(mailbox.put.remote(number, message))
        if len(pending) > 64:
            ray.get(pending.pop(0))

    run_chain(chain, place, machine, tell)
    ray.get(pending)


class RayEngine:
    """Runs chains with ``machine`` on the cluster at ``address`` (None: the one that RAY_ADDRESS names, else a local
    one).

    ``ram_bytes`` is what a task holds at most, the interpreter included; ``workers`` how many may run at once (None: as
    many as there is room for).
    """

    def __init__(
        self, machine: Machine, place: Place, address: str | None, workers: int | None, ram_bytes: int
    ) -> None:
        self._ray = ray = _import_ray()
        self._place, self._workers = place, workers
        if workers is not None and workers < 1:
            raise OptionError(f"workers is {workers}; there must be at least 1")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        address = address or os.environ.get("RAY_ADDRESS")
        _check_reachable(address)
        quiet = {"include_dashboard": False} if address is None else {}
        try:
            ray.init(address=address, logging_level="error", log_to_driver=False, **quiet)
        except (ConnectionError, ValueError, RuntimeError, OSError, TimeoutError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise DeviceError(f"no Ray cluster at {address}: {first}") from error
        total = ray.cluster_resources()
        on_gpu = machine.device.startswith("cuda") or (machine.device == "auto" and total.get("GPU", 0) >= 1)
        if on_gpu and not total.get("GPU"):
            self.close()
            raise DeviceError("the Ray cluster has no GPU; pass `device=cpu`")
        self._machine = replace(machine, device="cuda" if on_gpu else "cpu")  # Ray says which one
        cpus = max(int(total.get("CPU", 1)) // workers, 1) if workers else 1
        options = {"num_cpus": cpus, "num_gpus": 1 if on_gpu else 0, "memory": ram_bytes, "max_retries": 0}
        if ram_bytes > total.get("memory", ram_bytes):
            self.close()
            raise OptionError(
                f"a task needs {ram_bytes} bytes, the Ray cluster has {int(total['memory'])}; lower `ram_budget`"
            )
        self._task = ray.remote(_run).options(**options)
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        self._running: dict[Any, int] = {}

    def is_free(self) -> bool:
        return self._workers is None or len(self._running) < self._workers

    def submit(self, number: int, chain: Chain) -> None:
        reference = self._task.remote(self._mailbox, number, chain, self._place, self._machine)
        self._running[reference] = number

    def reports(self) -> list[Report]:
        ray = self._ray
        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=_POLL_SECONDS)
        found: list[Report] = [FromChain(*item) for item in ray.get(self._mailbox.take.remote())]
        for reference in ended:
            number = self._running.pop(reference)
            try:
                ray.get(reference)
                found.append(ChainEnded(number))
            except ray.exceptions.RayError as error:
                first = next(iter(str(error).splitlines()), type(error).__name__)
                found.append(WorkerLost(number, f"its worker was lost: {printable(first)}"))
        return found

    def close(self) -> None:
        self._ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise DeviceError unless somebody listens at ``address`` (host:port); Ray itself would try for many minutes."""
    match = re.fullmatch(r"(?:ray://)?(?P<host>[^/\s]+):(?P<port>\d{1,5})", address or "")
    if match is None:  # none, or a word that Ray knows
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise DeviceError(f"no Ray cluster at {address}: {error}") from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OptionError("`engine=ray` needs Ray: pip install 'streamcollapse[ray]'") from error
    return ray
