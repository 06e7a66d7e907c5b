"""lm-evaluation-harness asks, streamed models answer: its public interface of a model, over ``Answers``.

Texts become token ids as the harness's own class for transformers makes them, so that its figures are those of a model
in memory. After an import of this module the harness knows the model ``streamcollapse``:

    lm_eval --model streamcollapse --model_args source=DIR,plan=PLAN --tasks piqa
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from streamcollapse.errors import CalibrationError, OptionError
from streamcollapse.evaluation.answers import Answers, Question
from streamcollapse.forward.likelihood import Continued
from streamcollapse.merge.plan import Plan, original_layers
from streamcollapse.run.opened import open_job
from streamcollapse.run.refits import use_plan
from streamcollapse.run.samples import load_tokenizer, longest_context
from streamcollapse.settings.run import Compute, RunSettings, Streaming

_MOST_NEW = 256  # tokens, where a task does not say
_LONGEST, _UNKNOWN = 2048, 1 << 62  # tokens, where neither model nor tokenizer says; what tokenizers say then


@contextmanager
def quiet() -> Iterator[None]:
    """While the body runs, the harness says nothing: neither what is usual nor how far it is."""
    logger = logging.getLogger("lm_eval")
    level, disabled = logger.level, tqdm.__init__
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(disabled, disable=True)
    evaluator.get_git_commit_hash, known = lambda: None, evaluator.get_git_commit_hash  # of where the user stands
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__, evaluator.get_git_commit_hash = disabled, known


@register_model("streamcollapse")
class StreamedLM(TemplateLM):  # type: ignore[misc]
    """The model that ``plan`` makes of the checkpoint ``source``, or that itself. ``max_length``: tokens of a request,
    by default the model's context. ``more``: ``ram_budget``, ``vram_budget`` and ``trust_remote_code`` as everywhere;
    what the harness says of batches is not needed. Raises StreamCollapseError."""

    def __init__(
        self,
        source: str,
        plan: str | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **more: Any,
    ) -> None:
        unknown = more.keys() - {"ram_budget", "vram_budget", "trust_remote_code", "batch_size", "max_batch_size"}
        if unknown:
            raise OptionError(f"model_args: {', '.join(sorted(unknown))} says nothing to this model; leave it out")
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):  # as the harness has it
            device = "auto"
        settings = RunSettings(
            Compute(device, dtype),
            streaming=Streaming(ram_budget=more.get("ram_budget"), vram_budget=more.get("vram_budget")),
            trust_remote_code=bool(more.get("trust_remote_code")),
        )
        job = open_job(source, settings)
        layers = original_layers(job.num_layers), False
        if plan is not None:
            parsed = Plan.load(Path(plan))
            use_plan(job, parsed)
            layers = parsed.layers, parsed.merge_norms
        self._begin(Answers(job, [layers], settings.streaming), 0, max_length)

    @classmethod
    def of(cls, answers: Answers, stack: int, max_length: int | None = None) -> StreamedLM:
        """The stack with the number ``stack`` of ``answers``."""
        self = cls.__new__(cls)
        self._begin(answers, stack, max_length)
        return self

    def _begin(self, answers: Answers, stack: int, max_length: int | None) -> None:
        super().__init__()
        self._answers, self._stack = answers, stack
        job = answers.job
        self.tokenizer = load_tokenizer(job.checkpoint.directory, job.trust_remote_code)
        self._ends = _ends(job.checkpoint.directory, self.tokenizer)
        said = int(getattr(self.tokenizer, "model_max_length", _UNKNOWN))
        usual = said if said < _UNKNOWN else _LONGEST
        self.max_length = max_length or longest_context(job) or usual

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing is given of."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if begin is None and end is None:
            raise CalibrationError("the tokenizer has neither a first nor a last token, which the harness puts first")
        return int(end if begin is None else begin)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as the tokenizer's template has them."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether each is what would be generated."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # progress is shown anyway
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of ``string``, with what the tokenizer puts first, unless it is there or not wanted."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **more))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._answers.likelihoods([self._continued(*one[1:]) for one in requests], self._stack)
        answers = [(one.log_likelihood, one.is_greedy) for one in found]
        for (texts, _given, _continuation), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _continued(self, given: list[int], continuation: list[int]) -> Continued:
        """What is too long loses its beginning."""
        if not given or not continuation or len(continuation) > self.max_length:
            raise OptionError(
                f"a request has {len(given)} tokens to begin with and {len(continuation)} to score; at least one of "
                f"each is needed, and at most {self.max_length} to score (`max_length`)"
            )
        room = self.max_length + 1 - len(continuation)
        return Continued(tuple(given[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that do not overlap but for the last."""
        windows, owners = list[Continued](), list[int]()
        for number, (text,) in enumerate(request.args for request in requests):
            for window in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append(self._continued(*utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, one in zip(owners, self._answers.likelihoods(windows, self._stack), strict=True):
            totals[owner] += one.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with, always by the most probable token. Raises OptionError where it should not."""
        questions = [self._question(*request.args) for request in requests]
        answers = self._answers.generated(questions, self._stack)
        found = list[str]()
        for request, question, tokens in zip(requests, questions, answers, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            found.append(postprocess_generated_text(text, list(question.until), None))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _question(self, context: str, settings: dict[str, Any]) -> Question:
        how = normalize_gen_kwargs(settings, _MOST_NEW)
        if how.get("do_sample"):
            raise OptionError("a task draws its answers at random (do_sample), which is not streamed; leave it out")
        end = self.tokenizer.decode(self.eot_token_id)
        until, most = tuple(handle_stop_sequences(how.get("until"), eos=end)), int(how["max_gen_toks"])
        if most >= self.max_length:
            raise OptionError(
                f"a task asks for {most} tokens, which leaves no room for a question: max_length is {self.max_length}"
            )
        prompt = self.tok_encode(context)[-(self.max_length - most) :]

        def goes_on(tokens: Sequence[int]) -> bool:
            return tokens[-1] not in self._ends and not any(
                stop in self.tokenizer.decode(tokens, skip_special_tokens=False) for stop in until if stop
            )

        return Question(tuple(prompt), most, until, goes_on)


def _ends(directory: Path, tokenizer: Any) -> set[int]:
    """The tokens that end a text, by the checkpoint's settings for generation too, if it has any."""
    found = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        try:
            said = json.loads((directory / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found += said if isinstance(said, list) else [said]
    return {one for one in found if isinstance(one, int)}
