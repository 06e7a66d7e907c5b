"""What a user may set about an evaluation: which tasks of lm-evaluation-harness, how many examples, what is written."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from streamcollapse.settings.declared import Setting, Whole, settings


def _named(text: str) -> str:
    if not any(name.strip() for name in text.split(",")):
        raise ValueError("name a task at the least")
    return text


@settings("The method")
class Evaluating:
    """Which tasks, on which examples, in which form; and where results go."""

    tasks: Annotated[
        str,
        AfterValidator(_named),
        Setting("Tasks or groups of tasks of lm-evaluation-harness, with commas between.", metavar="NAME,..."),
    ]
    num_fewshot: Annotated[
        Annotated[Whole, Field(ge=0)] | None,
        Setting("Examples that come before each question.", default="what each task says"),
    ] = None
    limit: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Setting("Use only the first examples of each task; less than 1: this share of them.", default="all"),
    ] = None
    include_path: Annotated[
        str | Path | None,
        Setting("A directory with more task files (.yaml).", default="those of the harness alone", metavar="DIR"),
    ] = None
    apply_chat_template: Annotated[
        bool, Setting("Put questions, and examples as turns, into the tokenizer's chat template.")
    ] = False
    max_length: Annotated[
        Annotated[Whole, Field(ge=2)] | None,
        Setting("Tokens that a request may have; longer ones lose their beginning.", default="the model's context"),
    ] = None
    original: Annotated[
        bool, Setting("With plans, evaluate the model as it is too, beside them.", off="--no-original")
    ] = True

    output_path: Annotated[
        str | Path | None,
        Setting(
            "Write results here as lm-evaluation-harness does, in a directory for each model.",
            default="nothing is written",
            metavar="DIR",
        ),
    ] = None
    log_samples: Annotated[bool, Setting("Write every answer too, beside the results.")] = False

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]
