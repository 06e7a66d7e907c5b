"""What a user may set about healing: what is trained, on which text, by which loss, and in what steps."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from streamcollapse.errors import OptionError
from streamcollapse.settings.declared import OneOf, Setting, Whole, settings

LOSSES = ("kl", "nll", "mse")
RATES = {"lora": 1e-3, "whole": 0.005}  # of a tensor that is trained whole: of its root mean square


@settings("The method")
class AlsoHeal:
    """Whether a result is healed before it is written, and on what; all else as by default (Healing)."""

    wanted: Annotated[
        bool,
        Setting(
            "Train low-rank adapters on the result, end to end, towards SOURCE, and write it with them in its weights.",
            key="heal",
        ),
    ] = False
    file: Annotated[
        str | Path | None,
        Setting(
            "Text to heal on: .txt, or .jsonl or .parquet with a field text or messages; a pattern takes all that "
            "match; hub:org/name[/config][:split[:column]] is a dataset.",
            key="heal_text",
            default="encyclopedia, code and documentation, which ship with the package",
            metavar="FILE",
        ),
    ] = None
    tokens: Annotated[
        Whole,
        Field(ge=1024),
        Setting("About how many tokens of the text to heal on; what ships has about 80,000.", key="heal_tokens"),
    ] = 200_000

    def towards(self, teacher: str | Path) -> "Healing":
        """How that heals."""
        return Healing(teacher, file=self.file, tokens=self.tokens)


def _trained(text: str) -> str:
    if not re.fullmatch(r"lora(:all|:cuts)?|(cuts|last:[1-9]\d*|layers:\d+(,\d+)*)(\+head)?", text):
        raise ValueError(
            "choose lora, lora:all, lora:cuts, cuts, last:N or layers:N,N,..., the last three with +head too"
        )
    return text


@settings("The method")
class Healing:
    """From what healing learns, what it trains, on what, and how."""

    teacher: Annotated[
        str | Path,
        Setting("The model that PRUNED was pruned from: a directory, or an id on the Hub.", metavar="SOURCE"),
    ]
    train: Annotated[
        str,
        AfterValidator(_trained),
        Setting(
            "What is trained: lora, low-rank adapters on the matrices of the layers from the one below the lowest cut "
            "up; lora:all, of all layers; lora:cuts, of the layers below cuts; cuts, these whole; last:N, the N top "
            "layers whole; layers:N,N,..., these of PRUNED whole (counted from 0). last:N+head, and so on: final norm "
            "and head as well.",
            metavar="lora|lora:all|lora:cuts|cuts|last:N|layers:N,...[+head]",
        ),
    ] = "lora"
    rank: Annotated[Whole, Field(ge=1), Setting("Rank of the adapters.")] = 16
    alpha: Annotated[
        Annotated[float, Field(gt=0)] | None, Setting("Adapters count alpha / rank times.", default="twice the rank")
    ] = None
    targets: Annotated[
        str | None,
        Setting(
            "Last names of the modules that get adapters, with commas between: q_proj,v_proj.",
            default="every linear module",
            metavar="NAME,...",
        ),
    ] = None
    loss: Annotated[
        str,
        OneOf(LOSSES),
        Setting(
            "What is made small: kl, the divergence from the teacher's next-token distributions; nll, the loss on the "
            "text itself; mse, the distance from the teacher's last hidden states."
        ),
    ] = "kl"
    temperature: Annotated[float, Field(gt=0), Setting("Temperature of both distributions (kl).")] = 1.0
    file: Annotated[
        str | Path | None,
        Setting(
            "Text to heal on: .txt, or .jsonl or .parquet with a field text or messages; a pattern like "
            "'docs/**/*.txt' takes all that match; hub:org/name[/config][:split[:column]] is a dataset. A sixteenth is "
            "held out, to judge the healing.",
            key="text",
            default="encyclopedia, code and documentation, which ship with the package",
            metavar="FILE",
        ),
    ] = None
    tokens: Annotated[
        Whole,
        Field(ge=1024),
        Setting("About how many tokens of the text to heal on, spread evenly over it; what ships has about 80,000."),
    ] = 200_000
    length: Annotated[
        Whole, Field(ge=16), Setting("Tokens that run together; documents are packed to this length.")
    ] = 512
    rounds: Annotated[Whole, Field(ge=1), Setting("How often each token is learned from.")] = 1
    batch_tokens: Annotated[Whole, Field(ge=16), Setting("Tokens of a step, for which the weights are read twice.")] = (
        2048
    )
    loss_tokens: Annotated[
        Annotated[Whole, Field(ge=1)] | None,
        Setting(
            "Of about how many tokens of a step the loss is taken, spread evenly: with a large vocabulary the head "
            "takes longer than the layers.",
            default="all",
        ),
    ] = None
    rate: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Setting(
            "Largest learning rate, of AdamW; for layers that are trained whole in units of each tensor's size.",
            default=f"{RATES['lora']:g} for lora, {RATES['whole']:g} for layers",
        ),
    ] = None
    warm_up: Annotated[
        float, Field(ge=0, le=1), Setting("Share of the steps over which the rate rises; it then falls by a cosine.")
    ] = 0.1
    clip: Annotated[float, Field(gt=0), Setting("Largest norm of the gradients of a step.")] = 1.0
    judge_every: Annotated[
        Annotated[Whole, Field(ge=1)] | None,
        Setting("Steps from one judgement on held-out text to the next.", default="a tenth of all"),
    ] = None
    patience: Annotated[Whole, Field(ge=1), Setting("Judgements without a better one after which it ends.")] = 3
    adapter: Annotated[bool, Setting("Also write the adapters as peft has them, into DIR/adapter.")] = False

    def __post_init__(self) -> None:
        if self.adapter and not self.is_lora:
            raise OptionError(f"adapters are asked for, but {self.train} is trained whole; pass `train=lora`")
        if self.trains_head and self.loss == "mse":
            raise OptionError("loss is mse, which is of what enters the head; pass `loss=kl`, or leave +head out")

    @property
    def largest_rate(self) -> float:
        """The learning rate that the steps rise to."""
        return self.rate or RATES["lora" if self.is_lora else "whole"]

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained."""
        return self.train.startswith("lora")

    @property
    def trains_head(self) -> bool:
        """Whether final norm and head are trained as well."""
        return self.train.endswith("+head")

    @property
    def target_names(self) -> tuple[str, ...]:
        """The last names of modules that get adapters; empty: all linear ones."""
        return tuple(name.strip() for name in (self.targets or "").split(",") if name.strip())

    @property
    def scale_numerator(self) -> float:
        """alpha."""
        return self.alpha or 2.0 * self.rank

    def positions(self, num_layers: int, parted: int = 0, cuts: Sequence[int] = ()) -> list[int]:
        """0-based positions of a stack of ``num_layers`` where something is trained, if it is the teacher's own up to
        ``parted`` and the layers at ``cuts`` are those below one. Raises OptionError."""
        kind, _, which = self.train.removesuffix("+head").partition(":")
        if "cuts" in (kind, which):
            if not cuts:
                instead = "lora:all" if self.is_lora else "layers:N,..."
                raise OptionError(
                    f"train is {self.train}, but nothing says where layers were cut out; pass `train={instead}`"
                )
            return list(cuts)
        if kind == "lora":
            return list(range(0 if which == "all" else parted, num_layers))
        found = sorted({int(n) for n in which.split(",")})
        if kind == "last":
            found = list(range(num_layers - found[0], num_layers))
        if found[0] < 0 or found[-1] >= num_layers:
            raise OptionError(f"train is {self.train}, but the model has {num_layers} layers, counted from 0")
        return found
