"""What a user may set besides the method: where it computes, on which samples, how weights stream, what is written."""

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from streamcollapse.errors import OptionError
from streamcollapse.settings.declared import BudgetSize, FromText, OneOf, Setting, Size, Whole, settings
from streamcollapse.settings.heal import AlsoHeal
from streamcollapse.units import parse_bytes

# the calibration samples that ship with the package: ten sentences, and 24 passages of about 256 tokens:
# twelve of an encyclopedia, six of this project's code, six of its documentation
SAMPLES = ("sentences", "passages")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
IO_MODES = ("auto", "mmap", "pread", "direct")


def _lookahead(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.removeprefix("-").isdecimal():
        raise ValueError("it must be auto or a whole number")
    return int(text)


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("choose auto, cpu, cuda or cuda:N")
    return name


@settings("The run")
class Compute:
    """Where the forward pass runs.

    ``auto`` takes the first CUDA device if there is one, and computes in the checkpoint's dtype there. On a CPU it
    computes in bfloat16 where the checkpoint is stored so and the processor multiplies it natively, else in float32.
    """

    device: Annotated[str, AfterValidator(_device), Setting("Where to compute.", metavar="auto|cpu|cuda[:N]")] = "auto"
    dtype: Annotated[
        str,
        OneOf(("auto", *COMPUTE_DTYPES)),
        Setting(
            "Precision of the forward pass; auto: the checkpoint's dtype if the hardware supports it natively, "
            "otherwise float32.",
            key="compute_dtype",
        ),
    ] = "auto"


@settings("The method")
class Calibration:
    """Which samples to calibrate on; without ``file`` those of SAMPLES that suit the strategy."""

    file: Annotated[
        str | Path | None,
        Setting(
            "Samples: .txt with one a line, .jsonl or .parquet with a field text or messages, a pattern of these, or "
            "hub:org/name[:split[:column]], of which the first 128 count; sentences or passages, which ship with the "
            "package.",
            key="calibration",
            default="passages for greedy, else sentences",
            metavar="FILE",
        ),
    ] = None
    max_tokens: Annotated[
        Whole, Field(ge=1), Setting("Cut each calibration sample to this many tokens, special tokens included.")
    ] = 512


@settings("The run")
class Streaming:
    """How weights are streamed; no setting here changes a result."""

    lookahead: Annotated[
        Annotated[Whole, Field(ge=1)] | None,
        FromText(_lookahead),
        Setting(
            "Candidates evaluated in one pass over the weights; auto weighs reading against computing. Changes no "
            "result.",
            default="auto",
            metavar="auto|N",
        ),
    ] = None
    prefetch: Annotated[
        Whole, Field(ge=0, le=64), Setting("Layers read ahead of the computation. Changes no result.")
    ] = 2
    io: Annotated[
        str,
        OneOf(IO_MODES),
        Setting(
            "How weights are read: in place (mmap), through the page cache (pread) or past it (direct); auto measures. "
            "Changes no result."
        ),
    ] = "auto"
    ram_budget: Annotated[
        BudgetSize | None,
        Setting(
            "Memory to stay within, beyond the interpreter's own.", default="what is free, less a tenth", metavar="SIZE"
        ),
    ] = None
    vram_budget: Annotated[
        BudgetSize | None, Setting("GPU memory to stay within.", default="what is free, less a tenth", metavar="SIZE")
    ] = None
    work_dir: Annotated[
        str | Path | None,
        Setting(
            "Save progress here, to resume after a crash and to reuse in later searches of the same source and "
            "samples.",
            default="beside the output, until it is done",
            metavar="DIR",
        ),
    ] = None


@settings("The output")
class Output:
    """How a checkpoint is written."""

    max_shard_size: Annotated[Size, Setting("Largest shard of weights.", metavar="SIZE")] = "5GB"
    overwrite: Annotated[bool, Setting("Replace DIR once the new one is complete.")] = False

    @property
    def max_shard_bytes(self) -> int:
        """The largest shard, in bytes."""
        return parse_bytes(self.max_shard_size)


@settings("The output")
class Judging:
    """How the result of a job is judged: by its loss beside the source's on text that no search saw."""

    held_out: Annotated[
        str | Path | None,
        Setting(
            "UTF-8 text on which the result is judged; searches must not have seen it.",
            default="encyclopedia, which ships with the package",
            metavar="FILE",
        ),
    ] = None
    verdict: Annotated[
        bool, Setting("Say at the end how good the result is, by its loss on held-out text.", off="--no-verdict")
    ] = True


REPAIRS = ("auto", "none", "magnitude", "linear", "local")


@settings("The method")
class Repair:
    """How the layers before cuts are mended, and on which text."""

    method: Annotated[
        Annotated[str, OneOf(REPAIRS)] | None,
        Setting(
            "Fit the layers before cuts to what the original hands on above them. linear: one matrix of each, in "
            "closed form; local: every matrix of each, by Adam; auto: the one, then the other, then by what the whole "
            "says. magnitude: only scale what the layers above cuts add. Dropped where the loss on text that was not "
            "fitted to does not fall.",
            key="repair",
            default="auto where prune searches by greedy, not with effort quick, or a text is given; else none",
        ),
    ] = None
    file: Annotated[
        str | Path | None,
        Setting(
            "Text to repair on: .txt, or .jsonl or .parquet with a field text or messages; a pattern takes all that "
            "match; hub:org/name[/config][:split[:column]] is a dataset. A sixth is held out, to judge the repair.",
            key="repair_text",
            default="encyclopedia, code and documentation, which ship with the package",
            metavar="FILE",
        ),
    ] = None
    tokens: Annotated[
        Whole, Field(ge=1024), Setting("About how many tokens of the text to repair on.", key="repair_tokens")
    ] = 40_000

    @property
    def chosen(self) -> str:
        """The method; where none was given, none, but auto where a text was."""
        return self.method or ("none" if self.file is None else "auto")

    @property
    def is_given(self) -> bool:
        """Whether it was said if there is a repair."""
        return self.method is not None or self.file is not None

    @property
    def is_wanted(self) -> bool:
        """Whether there is a repair."""
        return self.chosen != "none"


@settings("The method")
class EvaluationText:
    """A text to predict, and how it is cut into windows."""

    file: Annotated[str | Path, Setting("UTF-8 text to predict.", key="text", metavar="FILE")]
    window: Annotated[
        Annotated[Whole, Field(ge=2)] | None, Setting("Tokens per window.", default="the model's context, at most 2048")
    ] = None
    stride: Annotated[
        Annotated[Whole, Field(ge=1)] | None,
        Setting(
            "Tokens from the beginning of a window to that of the next; each token is predicted once, with what the "
            "window has before it.",
            default="windows do not overlap",
        ),
    ] = None
    max_tokens: Annotated[
        Annotated[Whole, Field(ge=2)] | None, Setting("Use only the first tokens of the text.", default="all")
    ] = None


@settings("The method")
class Comparing:
    """How plans of one source are compared."""

    source: Annotated[
        str | Path | None,
        Setting(
            "The model that the plans are of: a directory, or an id on the Hub.",
            default="what the report of a pruned model names",
            metavar="SOURCE",
        ),
    ] = None
    file: Annotated[
        str | Path | None,
        Setting("UTF-8 text to predict.", key="text", default="one that ships with the package", metavar="FILE"),
    ] = None
    max_tokens: Annotated[
        Annotated[Whole, Field(ge=2)] | None,
        Setting(
            "About how many tokens of the text to predict, in windows spread over it.",
            default="2048; fewer where the vocabulary is large",
        ),
    ] = None
    speed: Annotated[
        bool, Setting("Also load each model as a whole and say how fast it generates; plans are written for that.")
    ] = False
    scratch: Annotated[
        str | Path | None,
        Setting(
            "Directory for models that are written to be measured, and removed again.",
            default="the system's temporary directory",
            metavar="DIR",
        ),
    ] = None
    samples: Annotated[
        bool, Setting("Have each model continue a few prompts, a pass over the weights a token.", off="--no-samples")
    ] = True


@settings("The run")
class BenchConditions:
    """Under what conditions a job is measured."""

    scratch: Annotated[
        str | Path | None,
        Setting(
            "Directory for the pruned checkpoint, which is removed again.",
            default="the system's temporary directory",
            metavar="DIR",
        ),
    ] = None
    cold: Annotated[bool, Setting("Drop SOURCE from the page cache first.")] = False


@settings("The run")
class Cluster:
    """What runs the tasks of a batch."""

    engine: Annotated[
        str, OneOf(("local", "ray")), Setting("Processes on this machine, or tasks of a Ray cluster.")
    ] = "local"
    ray_address: Annotated[
        str | None,
        Setting("Ray cluster to run on.", default="what RAY_ADDRESS names, else a local one", metavar="ADDRESS"),
    ] = None
    workers: Annotated[
        Annotated[Whole, Field(ge=1)] | None, Setting("Jobs side by side.", default="one for each device")
    ] = None
    retries: Annotated[Whole, Field(ge=0), Setting("How often to try again where a worker was lost.")] = 2

    def __post_init__(self) -> None:
        if self.ray_address is not None and self.engine != "ray":
            raise OptionError(f"a Ray address is given, but the engine is {self.engine}; pass `engine=ray`")


@settings("The run")
class RunSettings:
    """Everything that may be set about a run besides its method."""

    compute: Compute = field(default_factory=Compute)
    calibration: Calibration = field(default_factory=Calibration)
    streaming: Streaming = field(default_factory=Streaming)
    output: Output = field(default_factory=Output)
    judging: Judging = field(default_factory=Judging)
    repair: Repair = field(default_factory=Repair)
    also_heal: AlsoHeal = field(default_factory=AlsoHeal)
    trust_remote_code: Annotated[bool, Setting("Run Python code that comes with the checkpoint.")] = False
