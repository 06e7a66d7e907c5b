"""The error tree: everything the library raises on purpose.

Mistakes of our own are ``assert`` and never part of this tree.
"""


class StreamCollapseError(Exception):
    """Base class of every error that a user's input or machine can cause.

    Messages quote file names, config entries and tensor names, which anyone may have written: the text is escaped here,
    once (see ``printable``), so whoever raises an error quotes them as they are.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class CheckpointError(StreamCollapseError):
    """The checkpoint's files cannot be used as they are."""


class NonFiniteError(CheckpointError):
    """A weight, or what the model computes from it, is NaN or infinite."""


class ModelError(StreamCollapseError):
    """The checkpoint describes a model that cannot be pruned."""


class PlanError(StreamCollapseError):
    """The plan is malformed, or was made for another source."""


class JobsError(StreamCollapseError):
    """The file of jobs is malformed, or contradicts itself."""


class OptionError(StreamCollapseError):
    """A setting is outside its range."""


class CalibrationError(StreamCollapseError):
    """The calibration or evaluation text cannot be used."""


class BudgetError(StreamCollapseError):
    """The memory that may be used is less than what the run needs."""


class DeviceError(StreamCollapseError):
    """The requested device does not exist on this machine, or cannot do what it should."""


class DeviceFailedError(DeviceError):
    """A device reported an error while it was used. What it was given since then is lost, and for CUDA errors so is the
    process's connection to it."""


class OutputError(StreamCollapseError):
    """The output cannot be written where it was asked for."""


class NothingLearnedError(OutputError):
    """Healing has made nothing better, so that there is nothing to write."""


def is_of_device(error: BaseException) -> bool:
    """Whether ``error`` is torch's word for a device that failed or has no memory left, rather than for a wrong call.

    CUDA tells of an error at whatever call comes next, so it may turn up anywhere.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = isinstance(error, RuntimeError) and str(error).startswith(("CUDA", "cuBLAS", "cuDNN", "HIP", "NCCL"))
    return said or bool(kinds & {"OutOfMemoryError", "AcceleratorError"})


def printable(text: object) -> str:
    """``text`` with every character that could steer a terminal or break the line written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
