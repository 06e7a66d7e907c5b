"""Plans beside each other: what the table says is what the written models are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from streamcollapse import (
    Comparing,
    Compute,
    EvaluationText,
    RunSettings,
    SearchOptions,
    apply,
    compare,
    make_plan,
    perplexity,
    search,
)
from streamcollapse.cli.main import app
from streamcollapse.errors import CheckpointError, OptionError, PlanError
from tests.checkpoints import edit_json, save_llama

FLOAT32 = RunSettings(compute=Compute("cpu", "float32"))
ODD = 'a <b> & "c" [red].json'


@pytest.fixture(scope="module")
def results(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan by hand with an odd name, one of a search, and a model that was written."""
    place = tmp_path_factory.mktemp("results")
    make_plan(llama, "2", ["4-6:mean"]).save(place / ODD)
    search(
        llama, SearchOptions(strategy="block-influence", target_layers=5), settings=FLOAT32, save_as=place / "p.json"
    )
    apply(llama, make_plan(llama, "0"), place / "written", settings=FLOAT32)
    return place


def _fails(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_the_figures_are_those_of_the_written_models(llama: Path, results: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river was long and the valley was wide. " * 5)
    given = [results / ODD, results / "written", results / "p.json"]
    found = compare(given, conditions=Comparing(file=text), settings=FLOAT32)
    assert [model.name for model in found.models] == [found.source, ODD, "written", "p.json"]
    assert [model.layers for model in found.models] == [8, 5, 7, 5]
    assert found.models[1].method == "layer 2 dropped; layer 4 is a mix of 4-6"
    assert found.models[3].method == "block-influence, 5 layers"
    plans = [make_plan(llama, "2", ["4-6:mean"]), make_plan(llama, "0")]
    directories = [llama, *(apply(llama, p, tmp_path / str(n), settings=FLOAT32).out for n, p in enumerate(plans))]
    for directory, model in zip(directories, found.models, strict=False):
        alone = perplexity(directory, EvaluationText(text, window=128), settings=FLOAT32)
        assert model.nll == pytest.approx(alone.nll, rel=1e-6)
        assert model.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
        assert found.tokens == alone.tokens
        weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        assert weights * 0.95 < model.num_bytes < weights, "files have headers too"
    before = found.models[0].nll
    assert [model.rise for model in found.models] == [model.nll - before for model in found.models]  # type: ignore[operator]


def test_the_verb_prints_a_table_or_a_document(results: Path) -> None:
    arguments = ["compare", results / ODD, results / "written", "--max-tokens", "128", "--compute-dtype", "float32"]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    headings, _, odd, written, *_, last = done.stdout.splitlines()
    assert headings.split() == ["model", "method", "layers", "weights", "of", "it", "loss", "rise", "perplexity"]
    assert odd.startswith(ODD), "nothing in a name is acted on"
    assert written.split()[:5] == ["written", "layer", "0", "dropped", "7"]
    assert "127 tokens of the text encyclopedia, shipped; on cpu in float32" in last
    document: Any = json.loads(CliRunner().invoke(app, [*map(str, arguments), "--json"]).stdout)
    assert [model["name"] for model in document["models"][1:]] == [ODD, "written"]
    assert f"{document['models'][1]['perplexity']:.2f}" in odd


def test_speed_is_that_of_each_model_as_a_whole(results: Path, tmp_path: Path) -> None:
    conditions = Comparing(max_tokens=128, speed=True, scratch=tmp_path)
    found = compare([results / "written", results / "p.json"], conditions=conditions, settings=FLOAT32)
    assert all(model.tokens_per_second and model.tokens_per_second > 0 for model in found.models)
    assert list(tmp_path.iterdir()) == [], "what was written to be measured is gone"


def test_plans_that_cannot_be_compared_are_refused_in_a_line(results: Path, llama: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", 3)
    make_plan(other, "1").save(tmp_path / "other.json")
    assert "is of another source (other, 3 layers" in _fails("compare", results / "p.json", tmp_path / "other.json")
    assert "give plans of one source" in _fails("compare", results / "written", tmp_path / "other.json")
    said = _fails("compare", results / "p.json", "--source", other)
    assert "p.json: the plan is for a source of 8 layers, this one has 3" in said
    assert "no plan says; give the model as --source" in _fails("compare", results / "p.json")
    assert "none.json: cannot be read: No such file" in _fails("compare", tmp_path / "none.json")
    assert "holds no streamcollapse_plan.json" in _fails("compare", llama)
    (tmp_path / "later.json").write_bytes((results / "p.json").read_bytes())
    edit_json(tmp_path / "later.json", lambda plan: plan.update(format="streamcollapse.plan/2"))
    assert "format is streamcollapse.plan/2, this version reads" in _fails("compare", tmp_path / "later.json")
    with pytest.raises(PlanError, match="not JSON"):
        compare([results / "written" / "model.safetensors"])
    with pytest.raises(OptionError, match="no plan is given"):
        compare([])
    with pytest.raises(CheckpointError):
        compare([results / "p.json"], conditions=Comparing(source=tmp_path / "nowhere"))
    with pytest.raises(OptionError, match="nowhere: is no directory"):
        compare(
            [results / "written"],
            conditions=Comparing(max_tokens=20, speed=True, scratch=tmp_path / "nowhere"),
            settings=FLOAT32,
        )


def test_two_of_one_name_are_called_by_their_paths(llama: Path, results: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes((results / "p.json").read_bytes())
    conditions = Comparing(source=llama, max_tokens=20)
    found = compare([results / "p.json", tmp_path / "p.json"], conditions=conditions, settings=FLOAT32)
    assert [model.name for model in found.models[1:]] == [str(results / "p.json"), str(tmp_path / "p.json")]
    assert found.models[1].nll == found.models[2].nll
