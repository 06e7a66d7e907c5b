"""Tasks of lm-evaluation-harness on a checkpoint and on plans of it, with weights streamed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcollapse.errors import CalibrationError, OptionError, PlanError, StreamCollapseError, printable
from streamcollapse.merge.plan import Plan, original_layers
from streamcollapse.progress import Listener, PhaseStarted, silent
from streamcollapse.resources.meter import Usage
from streamcollapse.run.opened import Job, open_job
from streamcollapse.run.refits import use_plan
from streamcollapse.run.saved_reference import work_key
from streamcollapse.run.work_directory import work_directory
from streamcollapse.settings.evaluate import Evaluating
from streamcollapse.settings.run import RunSettings
from streamcollapse.storage.disk import Journal

ANSWERS = "answers.jsonl"  # in a work directory
EXTRA = "pip install 'streamcollapse[eval]'"


@dataclass(frozen=True)
class EvaluatedModel:
    """The model ``name`` of ``layers`` layers, and its ``results`` as the harness has them."""

    name: str
    layers: int
    results: dict[str, Any]

    @property
    def rows(self) -> list[tuple[str, str, float, float | None]]:
        """Task, metric, value and standard error, in the order of the harness."""
        found = []
        for task, measured in self.results["results"].items():
            for key, value in measured.items():
                metric, _, kind = key.partition(",")
                if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                    continue
                error = measured.get(f"{metric}_stderr,{kind}")
                said = metric if kind == "none" else f"{metric}, {kind}"
                found.append((task, said, float(value), error if isinstance(error, float) else None))
        return found


@dataclass(frozen=True)
class TaskResults:
    """``models`` on the same tasks, in one dtype on one device (``compute``)."""

    models: list[EvaluatedModel]
    compute: dict[str, str]
    usage: Usage


def evaluate(
    source: str | Path,
    asked: Evaluating,
    *,
    plans: Sequence[str | Path] = (),
    settings: RunSettings = RunSettings(),  # noqa: B008 - frozen
    listener: Listener = silent,
) -> TaskResults:
    """What the checkpoint ``source``, and the pruned models that ``plans`` (files) make of it, come to on tasks of
    lm-evaluation-harness. No model is written; each layer is read once for all requests of a kind and all models,
    as far as there is memory. With a work directory answers are kept there. Raises StreamCollapseError."""
    harness = _harness()
    parsed = [(printable(Path(plan).name), Plan.load(Path(plan))) for plan in plans]
    job = open_job(source, settings, listener)
    stacks, names = [(original_layers(job.num_layers), False)], [job.name]
    if parsed and not asked.original:
        stacks, names = [], []
    for name, plan in parsed:
        try:
            use_plan(job, plan)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error
        stacks.append((plan.layers, plan.merge_norms))
        names.append(name)
    with _journal(job, settings) as journal:
        answers = harness.Answers(job, stacks, settings.streaming, journal, settings.streaming.work_dir)
        manager = _manager(asked)
        models = [
            EvaluatedModel(name, len(layers), _results(harness, answers, number, name, (asked, manager)))
            for number, (name, (layers, _)) in enumerate(zip(names, stacks, strict=True))
        ]
        job.checkpoint.check_unchanged()
    return TaskResults(models, job.compute(), job.meter.summary())


def _harness() -> Any:
    """The module that speaks to the harness. Raises OptionError where that is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise OptionError(f"evaluating takes lm-evaluation-harness: {EXTRA}") from None
    from streamcollapse.evaluation import harness

    return harness


@contextmanager
def _journal(job: Job, settings: RunSettings) -> Iterator[Journal | None]:
    """Where answers are kept, if there is a work directory."""
    place = settings.streaming.work_dir
    if place is None:
        yield None
        return
    path = Path(place)
    hint = f"answers saved in {printable(path)}; run the same command again to resume"
    with work_directory(path, work_key(job, None, False), {}, {}, persistent=True, hint=hint):
        yield Journal(path / ANSWERS)


def _manager(asked: Evaluating) -> Any:
    """The harness's index of tasks; where the user's own have all that are asked for, of these alone, which is quick.
    Raises OptionError."""
    from lm_eval.tasks import TaskManager

    include = None if asked.include_path is None else str(asked.include_path)
    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False)
        if all(own.match_tasks([task]) for task in asked.names):
            return own
    found = TaskManager(include_path=include)
    unknown = [task for task in asked.names if not found.match_tasks([task])]
    if unknown:
        raise OptionError(f"tasks: the harness has no {', '.join(unknown)}; `lm_eval ls tasks` lists what it has")
    return found


def _results(harness: Any, answers: Any, number: int, name: str, what: tuple[Evaluating, Any]) -> dict[str, Any]:
    """What the harness says of the stack with that ``number``. Raises OptionError, CalibrationError."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import sanitize_model_name

    asked, manager = what
    answers.job.listener(PhaseStarted("tasks"))
    tracker = EvaluationTracker(output_path=None if asked.output_path is None else str(asked.output_path))
    began = time.time()
    try:
        with harness.quiet():
            found: dict[str, Any] = simple_evaluate(
                harness.StreamedLM.of(answers, number, asked.max_length),
                tasks=asked.names,
                num_fewshot=asked.num_fewshot,
                limit=_limit(asked.limit),
                apply_chat_template=asked.apply_chat_template,
                log_samples=asked.log_samples,
                evaluation_tracker=tracker,
                task_manager=manager,
            )
    except StreamCollapseError:
        raise
    except (OSError, ValueError, KeyError, ImportError, AssertionError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        fetch = f'python -c "from lm_eval.tasks import TaskManager; TaskManager().load({asked.names})"'
        more = f"; where there is a network, {fetch} fetches their data" if isinstance(error, OSError) else ""
        raise CalibrationError(f"tasks {asked.tasks}: {printable(first)}{more}") from error
    samples = found.pop("samples", None)
    found["config"]["model"], found["date"] = name, began
    if asked.output_path is not None:
        known = tracker.general_config_tracker
        known.model_name, known.model_name_sanitized = name, sanitize_model_name(name)
        tracker.save_results_aggregated(results=found, samples=samples)
        for task, some in (samples or {}).items():
            tracker.save_results_samples(task_name=task, samples=some)
    return found


def _limit(limit: float | None) -> float | None:
    return limit if limit is None or not math.isclose(limit, round(limit)) else round(limit)
