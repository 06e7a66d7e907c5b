"""Chains of tasks in processes on this machine, one for each device unless told otherwise.

A process of its own for each worker: what is killed or crashes leaves the others alone, and gives its memory back.
"""

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import psutil
import torch

from streamcollapse.batches.tasks import Chain
from streamcollapse.batches.worker import (
    INTERPRETER_BYTES,
    ChainEnded,
    FromChain,
    Machine,
    Message,
    Place,
    Report,
    WorkerLost,
    run_chain,
)
from streamcollapse.errors import DeviceFailedError, OptionError
from streamcollapse.resources.budget import MARGIN, free_ram
from streamcollapse.resources.device import free_vram, resolve
from streamcollapse.resources.processes import fresh_processes
from streamcollapse.settings.run import Compute, Streaming

_POLL_SECONDS = 0.5
_DEVICE_FAILED = 75  # exit code of a worker whose process cannot use its device any more (EX_TEMPFAIL)
_LAST_WORDS_SECONDS = 5.0


def machines(
    device: str, workers: int | None, most: int, streaming: Streaming, trust_remote_code: bool
) -> list[Machine]:
    """What each of ``workers`` works with (None: one for each device that ``device`` means), but at ``most`` so many.

    The budgets in ``streaming`` are those of one worker; where they are not given, workers share what is free. They
    share the processor as well. Raises DeviceError, OptionError.
    """
    if workers is not None and workers < 1:
        raise OptionError(f"workers is {workers}; there must be at least 1")
    devices = _devices(device)
    count = max(min(len(devices) if workers is None else workers, most), 1)
    if count == 1:
        return [Machine(devices[0], streaming, None, trust_remote_code)]
    ram, vram = streaming.ram_budget, streaming.vram_budget
    if ram is None:
        ram = max((int(free_ram() * (1 - MARGIN)) - count * INTERPRETER_BYTES) // count, 1)
    on_one_device = -(-count // len(devices))
    if vram is None and on_one_device > 1 and devices[0] != "cpu":
        vram = int(free_vram(torch.device(devices[0])) * (1 - MARGIN)) // on_one_device
    threads = max(len(psutil.Process().cpu_affinity()) // count, 1) if hasattr(psutil.Process, "cpu_affinity") else None
    share = replace(streaming, ram_budget=ram, vram_budget=vram)
    return [Machine(devices[i % len(devices)], share, threads, trust_remote_code) for i in range(count)]


def _devices(device: str) -> list[str]:
    if device == "auto" and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(resolve(Compute(device), torch.float32).device)]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    chain: int | None = None


class LocalEngine:
    """A worker for each of ``machines``; processes start when they are needed."""

    def __init__(self, machines: Sequence[Machine], place: Place) -> None:
        self._machines, self._place = machines, place
        self._workers: dict[int, _Worker] = {}

    def is_free(self) -> bool:
        return self._free() is not None

    def _free(self) -> int | None:
        busy = {index for index, worker in self._workers.items() if worker.chain is not None}
        return next((index for index in range(len(self._machines)) if index not in busy), None)

    def submit(self, number: int, chain: Chain) -> None:
        index = self._free()
        assert index is not None
        if index not in self._workers:
            self._workers[index] = self._start(index)
        worker = self._workers[index]
        worker.chain = number
        worker.pipe.send(chain)

    def _start(self, index: int) -> _Worker:
        context = fresh_processes(run_chain.__module__)
        ours, theirs = context.Pipe()
        arguments = (theirs, self._place, self._machines[index])
        process = context.Process(target=_work, args=arguments, name=f"streamcollapse-{index}", daemon=True)
        with _no_interrupts():  # it is born deaf to them, or one would end it in the midst of its imports
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def reports(self) -> list[Report]:
        pipes = [worker.pipe for worker in self._workers.values() if worker.chain is not None]
        ready = wait(pipes, _POLL_SECONDS)
        found: list[Report] = []
        for index, worker in list(self._workers.items()):
            if worker.pipe in ready and worker.chain is not None:
                found += self._read(index, worker, worker.chain)
        return found

    def _read(self, index: int, worker: _Worker, number: int) -> list[Report]:
        try:
            message: Message | None = worker.pipe.recv()
        except (EOFError, OSError):
            del self._workers[index]
            worker.process.join(_LAST_WORDS_SECONDS)
            return [WorkerLost(number, _reason(worker.process.exitcode))]
        if message is None:
            worker.chain = None
            return [ChainEnded(number)]
        return [FromChain(number, message)]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(_LAST_WORDS_SECONDS)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._workers.clear()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold back an interrupt, from this thread and from processes that it starts, to the end of the body."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reason(exit_code: int | None) -> str:
    if exit_code == _DEVICE_FAILED:
        return "its worker's device failed"
    if exit_code is None or exit_code >= 0:
        return f"its worker ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    memory = " (the system may have run out of memory)" if name == "SIGKILL" else ""
    return f"its worker was ended by {name}{memory}"


def _work(pipe: Connection, place: Place, machine: Machine) -> None:
    """A worker's life: chains from the pipe, messages into it, None after each chain."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the batch itself ends its workers
    signal.signal(signal.SIGTERM, _leave)
    warnings.simplefilter("ignore")
    while True:
        try:
            chain = pipe.recv()
            run_chain(chain, place, machine, pipe.send)
            pipe.send(None)
        except (EOFError, BrokenPipeError):  # nobody is there any more
            return
        except DeviceFailedError:  # for every job that followed, too
            sys.exit(_DEVICE_FAILED)


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)  # on the way out, what is half done is removed
