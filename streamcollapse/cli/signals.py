"""Signals that end a run: cleaned up after, in one line, and at once if they are sent again."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 128 + 2
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_ONE_PRESS_SECONDS = 2.0  # a signal that comes again within is the same wish: a shell, or an impatient finger


class EndedError(KeyboardInterrupt):
    """A signal asked the program to end: cleaned up after like an interrupt, with the exit code of the signal."""

    exit_code = INTERRUPTED


class _Ending:
    """Raises EndedError for the first signal; lets the cleaning up finish; a later signal ends the process at once.

    Nothing is lost by that: the progress of a run is on the disk already.
    """

    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
            ended = EndedError()
            ended.exit_code = 128 + number
            raise ended
        if time.monotonic() - self._first > _ONE_PRESS_SECONDS:
            _leave(number, b"at once; run the same command again to resume")


def _leave(number: int, text: bytes) -> None:
    os.write(2, b"interrupted: " + text + b"\n")
    os._exit(128 + number)


def end_at_once() -> None:
    """Before a run has begun, a signal ends the process: there is nothing to clean up."""
    _handle(lambda number, frame: _leave(number, b"nothing had begun"))


def end_in_order() -> None:
    """From now on, a signal raises EndedError in the main thread."""
    _handle(_Ending())


def leave_quickly() -> None:
    """The end of the program: whatever is to be said or kept has been. Called while its SystemExit is on the way.

    What Python and the libraries do at their end takes a second, and a signal would break into it with a traceback:
    after a signal the process ends here, otherwise signals are no longer heard.
    """
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    code = getattr(sys.exception(), "code", None)
    if isinstance(code, int) and code > 128:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell that runs this in the background
            signal.signal(number, handler)


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """The exit code that ``interrupt`` asks for."""
    return interrupt.exit_code if isinstance(interrupt, EndedError) else INTERRUPTED
