"""Tasks of lm-evaluation-harness, streamed, against the harness's own model in memory."""

from __future__ import annotations

import json
import random
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from streamcollapse import RunSettings, Streaming
from streamcollapse.cli.main import app
from streamcollapse.errors import BudgetError, CalibrationError, OptionError
from streamcollapse.evaluation.answers import Answers
from streamcollapse.evaluation.trials import Trials
from streamcollapse.jobs.apply import apply
from streamcollapse.jobs.evaluate import ANSWERS, evaluate
from streamcollapse.jobs.planning import make_plan
from streamcollapse.progress import Event, NoteMade
from streamcollapse.run.layer_needs import EvaluationSize, plan_evaluation
from streamcollapse.run.opened import open_job
from streamcollapse.settings.evaluate import Evaluating
from streamcollapse.settings.run import Compute, Judging
from streamcollapse.storage.scratch import DiskScratch
from tests.checkpoints import BUNDLED, save_model
from tests.families import FAMILIES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from streamcollapse.evaluation.harness import StreamedLM

evaluate_module, answers_module = (sys.modules[one.__module__] for one in (evaluate, Answers))
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and its metrics are not ours
FLOAT32 = RunSettings(Compute("cpu", "float32"), judging=Judging(verdict=False))
WORDS = ("river", "stone", "bread", "king", "music", "paper", "garden", "winter", "tower", "light", "horse", "city")
TASKS = "tiny_choice,tiny_cloze,tiny_rolling,tiny_generated"
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "What is in the {{question}}?"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
CLOZE = """
task: tiny_cloze
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{last}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ROLLING = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATED = """
task: tiny_generated
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{last}}"
generation_kwargs: {until: ["\n", "."], max_gen_toks: 9}
metric_list: [{metric: exact_match}]
"""
DRAWN = GENERATED.replace("until:", "do_sample: true, temperature: 0.7, until:").replace("generated", "drawn")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files and their data, all of it here."""
    place, dice = tmp_path_factory.mktemp("tasks"), random.Random(2)

    def some(count: int) -> str:
        return " ".join(dice.choice(WORDS) for _ in range(count))

    documents = [
        {
            "question": some(3),
            "choices": [some(dice.randint(1, 3)) for _ in range(4)],
            "answer": dice.randrange(4),
            "last": some(1),
            "text": some(40 + 9 * number),
        }
        for number in range(12)
    ]
    (place / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {place / 'data.jsonl'}}}}}\n"
    for number, text in enumerate((CHOICE, CLOZE, ROLLING, GENERATED, DRAWN)):
        more = "validation_split: validation\nfewshot_split: validation\nmetadata: {version: 1}\n"
        (place / f"{number}.yaml").write_text(text.lstrip() + data + more)
    return place


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def in_memory(directory: Path, tasks: Path, **more: Any) -> dict[str, Any]:
    length = 64 if directory.name == "m" else None  # what small models take, if their config says so or not
    model = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=3, max_length=length)
    return asked_by_the_harness(model, tasks, **more)


def asked_by_the_harness(model: Any, tasks: Path, **more: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model, tasks=TASKS.split(","), task_manager=manager, log_samples=True, **more)
    assert found is not None
    return dict(found)


def answers(found: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [response[0] for sample in samples for response in sample["resps"]]


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for task in TASKS.split(","):
        for one, other in zip(answers(ours, task), answers(theirs, task), strict=True):
            if isinstance(one, str):
                assert one == other
            elif isinstance(one, tuple):
                assert one[0] == pytest.approx(other[0], abs=1e-4)
                assert one[1] == other[1], "greedy"
            else:
                assert one == pytest.approx(other, abs=1e-4, rel=1e-6)
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float) and "acc" in metric:
                assert ours["results"][task][metric] == value
            elif isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral, sliding",
        "gemma 3, two rotary bases",
        "gpt 2, learned positions, tied",
        "mixtral, experts",
        "mpt, alibi",
        "bloom, alibi",
    ],
)
def test_equals_the_harness_s_own_model(family: str, tasks: Path, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family](), tmp_path / "m", gain=1.0)
    shots = {"num_fewshot": 1}
    ours = asked_by_the_harness(StreamedLM(str(directory), dtype="float32", max_length=64), tasks, **shots)
    same(ours, in_memory(directory, tasks, **shots))


def test_questions_in_a_chat_template_equal_the_harness_s_own_too(tasks: Path, tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"](), tmp_path / "m", gain=1.0)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    how = {"num_fewshot": 1, "apply_chat_template": True}
    ours = asked_by_the_harness(StreamedLM(str(directory), dtype="float32", max_length=64), tasks, **how)
    assert any("assistant:" in str(sample["arguments"]) for sample in ours["samples"]["tiny_choice"])
    same(ours, in_memory(directory, tasks, **how))


def test_a_trained_model_with_a_plan_and_examples(tasks: Path, tmp_path: Path) -> None:
    """Through the job: both models in one go, each as it is alone; the pruned one as the written one in memory."""
    plan = make_plan(BUNDLED, drop="12-15")
    plan.save(tmp_path / "plan.json")
    asked = Evaluating(TASKS, num_fewshot=3, include_path=tasks, limit=8)
    read = evaluate(BUNDLED, asked, settings=FLOAT32)
    both = evaluate(BUNDLED, asked, plans=[tmp_path / "plan.json"], settings=FLOAT32)
    assert [(one.name, one.layers) for one in both.models] == [("wiki-llama-24l", 24), ("plan.json", 20)]
    assert both.models[0].rows == read.models[0].rows
    alone = evaluate(BUNDLED, replace(asked, original=False), plans=[tmp_path / "plan.json"], settings=FLOAT32)
    assert alone.models[0].rows == both.models[1].rows
    assert sum(one["bytes_read"] for one in both.usage["phases"]) < 1.5 * sum(
        one["bytes_read"] for one in read.usage["phases"]
    ), "the passes are shared"
    written = apply(BUNDLED, plan, tmp_path / "out", settings=FLOAT32).out
    theirs = in_memory(written, tasks, num_fewshot=3, limit=8)["results"]
    for task, metric, value, _ in both.models[1].rows:
        assert value == pytest.approx(theirs[task][f"{metric},none"], rel=1e-4)


def test_texts_are_the_same_whatever_is_kept_and_where(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values in memory, in files, or nothing kept; and another run goes on with what is known."""
    asked = Evaluating("tiny_generated", num_fewshot=2, include_path=tasks, limit=5, log_samples=True)
    texts = list[list[Any]]()
    simple = evaluate_module._results

    def seen(harness: Any, known: Answers, *more: Any) -> Any:
        found = simple(harness, known, *more)
        texts.append(list(known._texts.values()))
        return found

    monkeypatch.setattr(evaluate_module, "_results", seen)
    plain = evaluate(BUNDLED, asked, settings=FLOAT32)
    places = list[str]()
    allocate = DiskScratch.allocate

    def noted(self: DiskScratch, name: str, *more: Any) -> Any:
        places.append(name)
        return allocate(self, name, *more)

    monkeypatch.setattr(DiskScratch, "allocate", noted)
    spilled = replace(FLOAT32, streaming=Streaming(work_dir=tmp_path / "work"))
    with monkeypatch.context() as short:
        short.setattr(answers_module, "plan_evaluation", _spilling)
        said = list[Event]()
        one = evaluate(BUNDLED, asked, settings=spilled, listener=said.append)
    assert len(places) == 48, "keys and values of a row in each of 24 layers"
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()], "and nothing stays"
    assert any(
        "5 texts to be gone on with: up to 9 passes" in event.text for event in said if isinstance(event, NoteMade)
    )
    with monkeypatch.context() as nothing:
        nothing.setattr(answers_module, "tried", lambda *given: Trials(False, None))
        other = evaluate(BUNDLED, asked, settings=FLOAT32)
    with monkeypatch.context() as known:
        known.setattr(Answers, "_generate", lambda *given: pytest.fail("it was known"))
        again = evaluate(BUNDLED, asked, settings=spilled)
    assert plain.models[0].rows == one.models[0].rows == other.models[0].rows == again.models[0].rows
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert all(1 <= len(text) <= 9 for text in texts[0])


def test_keys_and_values_are_spilled_where_they_are_more_than_the_budget() -> None:
    job, budget = open_job(BUNDLED, FLOAT32), Streaming(ram_budget="400MiB")
    for kept, is_spilled in ((1 << 20, False), (1 << 29, True)):
        memory, _ = plan_evaluation(job, EvaluationSize(2000, 256, 256, 64, 1, kept), budget)
        assert memory.spill == is_spilled
        assert any(need.what == "keys and values" for need in memory.needs) != is_spilled


def _spilling(*given: Any) -> Any:
    memory, held = plan_evaluation(*given)
    return replace(memory, spill=True), held


def test_answers_are_kept_and_results_written_as_the_harness_does(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Evaluating("tiny_choice", include_path=tasks)
    kept = replace(FLOAT32, streaming=Streaming(work_dir=tmp_path / "work"))
    logged = replace(asked, output_path=tmp_path / "results", log_samples=True)
    first = evaluate(BUNDLED, logged, settings=kept)
    files = sorted(path.name.split("_20")[0] for path in (tmp_path / "results" / "wiki-llama-24l").iterdir())
    assert files == ["results", "samples_tiny_choice"]
    written = next((tmp_path / "results" / "wiki-llama-24l").glob("results_*.json"))
    assert json.loads(written.read_text())["results"]["tiny_choice"]["acc,none"] == first.models[0].rows[0][2]
    lines = (tmp_path / "work" / ANSWERS).read_text().splitlines()
    assert 40 < len(lines) <= 48, "twelve questions with four answers, some of which are the same"
    computed = list[int]()
    compute = Answers._compute

    def counted(self: Answers, keys: Any, requests: Any) -> None:
        computed.append(len(requests))
        compute(self, keys, requests)

    monkeypatch.setattr(Answers, "_compute", counted)
    again = evaluate(BUNDLED, asked, settings=kept)
    assert not computed
    assert again.models[0].rows == first.models[0].rows
    (tmp_path / "work" / ANSWERS).write_text("\n".join([*lines[:30], lines[30][:40]]))  # killed while it wrote
    third = evaluate(BUNDLED, asked, settings=kept)
    assert computed == [len(lines) - 30]
    assert third.models[0].rows == first.models[0].rows


def test_what_cannot_be_evaluated_is_one_line(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Evaluating("tiny_choice", include_path=tasks)
    for given, error, message in (
        (replace(asked, tasks="tiny_choice,tiny_choices"), OptionError, "the harness has no tiny_choices"),
        (replace(asked, tasks="tiny_drawn"), OptionError, "at random"),
        (replace(asked, tasks="tiny_generated", max_length=9), OptionError, "leaves no room for a question"),
        (replace(asked, tasks="piqa"), CalibrationError, r"TaskManager\(\).load\(\['piqa'\]\)"),
    ):
        with monkeypatch.context() as nothing, pytest.raises(error, match=message):
            nothing.setattr(Answers, "_compute", lambda *given: pytest.fail("something was computed"))
            evaluate(BUNDLED, given, settings=FLOAT32)
    small = replace(FLOAT32, streaming=Streaming(ram_budget="40MiB"))
    with pytest.raises(BudgetError, match="evaluate needs"):
        evaluate(BUNDLED, asked, settings=small)
    with pytest.raises(OptionError, match="name a task"):
        Evaluating(" , ")


def test_on_the_command_line(tasks: Path, tmp_path: Path) -> None:
    make_plan(BUNDLED, drop="12-15").save(tmp_path / "plan.json")
    given = ["evaluate", str(BUNDLED), "--tasks", "tiny_choice", "--include-path", str(tasks), "--limit", "4"]
    shown = CliRunner().invoke(app, [*given, "--plan", str(tmp_path / "plan.json")], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "wiki-llama-24l, 24 layers" in shown.output
    assert "plan.json, 20 layers" in shown.output
    assert "acc_norm" in shown.output
    found = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)
    assert found["models"][0]["results"]["tiny_choice"]["sample_len"] == 4
