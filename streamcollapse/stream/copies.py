"""The one seam between the weight stream and a device: copies that run beside the computation.

Everything about CUDA streams, events and pinned memory is here. Tests put a stand-in in its place whose copies are
slow, late or fail.
"""

import contextlib
import mmap
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from streamcollapse.errors import DeviceError
from streamcollapse.storage.reader import private_memory

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context, not only for the thread's own


class Copies(Protocol):
    """Host-to-device copies in order of issue. A ticket stands for work issued up to some point."""

    def host_block(self, num_bytes: int) -> torch.Tensor:
        """``num_bytes`` of page-aligned host memory, as uint8, from which copies need not wait."""

    def device_block(self, num_bytes: int) -> torch.Tensor:
        """``num_bytes`` of device memory, as uint8."""

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: Any | None) -> Any:
        """Begin to copy ``source`` to ``target`` once the work of ``after`` (None: all computation issued so far) is
        done; returns the copy's ticket."""

    def arrive(self, ticket: Any) -> None:
        """Computation issued from now on sees what the copy of ``ticket`` brought."""

    def mark(self) -> Any:
        """A ticket for all computation issued so far."""

    def wait(self, ticket: Any) -> None:
        """Return when the work of ``ticket`` is done."""

    def free(self) -> None:
        """Let go of all host blocks, once no copy reads them."""


class CudaCopies:
    """Copies on a stream of their own, from memory that is registered with the driver at its exact size.

    Torch's own pinned allocator rounds sizes up to powers of two, which for slots of gigabytes is gigabytes.
    Made, and ``arrive`` and ``mark`` called, by the thread that computes; ``upload`` and blocks also come from the
    thread that loads, whose current device and stream are others.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._registered: list[tuple[mmap.mmap, int]] = []
        # without ``free``, memory that is let go of would stay pinned, and its addresses could not be pinned again
        weakref.finalize(self, _unregister, self._registered).atexit = False

    def host_block(self, num_bytes: int) -> torch.Tensor:
        memory = private_memory(num_bytes)
        block = torch.frombuffer(memory, dtype=torch.uint8)
        with torch.cuda.device(self._device):  # registering must not make a context on another device
            status = int(_driver().cudaHostRegister(block.data_ptr(), num_bytes, _PORTABLE))
            if status != 0:
                self._forget_error()
                raise DeviceError(
                    f"{num_bytes} bytes of host memory cannot be pinned (CUDA error {status}); pass a smaller "
                    "`ram_budget`, raise the limit of locked memory, or pass `io=mmap`, which pins none"
                )
        self._registered.append((memory, block.data_ptr()))
        return block

    def _forget_error(self) -> None:
        """The driver reports an error once more to whoever launches a kernel next: let that be this one."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)

    def device_block(self, num_bytes: int) -> torch.Tensor:
        # The allocator hands freed memory on in the order of one stream: that of the computation, whoever asks.
        with self._computing(), torch.inference_mode(False):  # filled again from threads in and out of that mode
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            else:  # new memory may be what a computation still under way has let go of
                self._stream.wait_stream(self._compute)
            target.copy_(source, non_blocking=True)
            target.record_stream(self._stream)  # freed before the copy is done, it is not given to others
            event: torch.cuda.Event = self._stream.record_event()
            return event

    def arrive(self, ticket: torch.cuda.Event) -> None:
        self._compute.wait_event(ticket)

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self._compute.record_event()
        return event

    def wait(self, ticket: torch.cuda.Event) -> None:
        ticket.synchronize()

    def rate(self, num_bytes: int = 1 << 30) -> float:
        """Bytes a second from pinned memory to the device: the ceiling of a streamed pass. The best of three copies."""
        try:
            source, target = self.host_block(num_bytes).fill_(0), self.device_block(num_bytes)
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                self.wait(self.upload(target, source, None))
                seconds.append(time.perf_counter() - start)
        finally:
            self.free()
        return num_bytes / min(seconds)

    def free(self) -> None:
        # Also after an error of the device, when waiting fails as well: memory that is unmapped while it is registered
        # stays pinned until the process ends, and its addresses cannot be registered again.
        try:
            self._stream.synchronize()
        finally:
            _unregister(self._registered)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._compute):
            yield


def _unregister(registered: list[tuple[mmap.mmap, int]]) -> None:
    while registered:
        _, address = registered.pop()
        _driver().cudaHostUnregister(address)


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
