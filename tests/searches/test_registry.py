"""A strategy is one object in one file: what is written nowhere else is listed, run, recorded and described."""

from __future__ import annotations

import ast
import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import streamcollapse
from streamcollapse import RunSettings, SearchOptions, prune
from streamcollapse.cli.main import app
from streamcollapse.errors import OptionError
from streamcollapse.searches import registry
from streamcollapse.searches.registry import complete, ignored_settings, strategies, usual_repair
from streamcollapse.settings.catalogue import EFFORTS

PACKAGE = Path(streamcollapse.__file__).parent
ENTRY_POINTS = "[streamcollapse.strategies]\nevery-other = tests.searches.every_other:STRATEGY\n"
METHOD = ["--strategy", "every-other", "-H", "7", "--device", "cpu"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that brings the strategy ``every-other`` is installed, here and in processes that start from here."""
    site = tmp_path / "site"
    package = site / "somebody_else-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody-else\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(site)
    registry.strategies.cache_clear()
    yield
    monkeypatch.undo()
    registry.strategies.cache_clear()


def _invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_strategies_there_are() -> None:
    assert list(strategies()) == ["greedy", "angular", "block-influence", "laco", "rule-based"]
    assert all(one.name == name and one.summary and one.source and one.cost for name, one in strategies().items())


def test_a_strategy_from_a_package_runs_everywhere(llama: Path, tmp_path: Path, installed: None) -> None:
    listed = json.loads(_invoke("strategies", "--json"))["strategies"]["every-other"]
    assert listed["defaults"] == {"metric": "token-cosine", "rescale": False}
    assert "drops every other layer, from the top" in _invoke("strategies")
    pages = runpy.run_path(str(PACKAGE.parent / "docs" / "generate.py"))["PAGES"]
    assert "| `every-other` | drops every other layer, from the top |" in pages["strategies.md"]()

    out = tmp_path / "out"
    dry = _invoke("prune", str(llama), "--out", str(out), *METHOD, "--dry-run")
    assert "every-other, metric token-cosine" in dry
    assert "3 at most" in dry
    shown = _invoke("prune", str(llama), "--out", str(out), *METHOD)
    assert "3 tested, 3 dropped" in shown
    plan = json.loads((out / "streamcollapse_plan.json").read_text())
    assert [layer["base"] for layer in plan["layers"]] == [0, 1, 3, 5, 7]
    assert plan["search"]["strategy"] == "every-other"
    assert "Strategy `every-other`" in (out / "README.md").read_text()

    found = prune(llama, tmp_path / "again", SearchOptions(strategy="every-other", target_layers=7))
    assert found.plan.num_layers == 7


def test_a_batch_runs_it_in_processes_of_its_own(llama: Path, tmp_path: Path, installed: None) -> None:
    jobs = {"out": "results", "jobs": [{"source": str(llama), "strategy": "every-other", "target_layers": [7, 6]}]}
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(jobs))
    report = json.loads(_invoke("batch", str(tmp_path / "jobs.yaml"), "--device", "cpu", "--json"))
    assert [job["name"] for job in report["jobs"]] == ["model-every-other-N7", "model-every-other-N6"]
    assert {job["status"] for job in report["jobs"]} == {"done"}


def test_it_is_gone_with_its_package(llama: Path) -> None:
    with pytest.raises(OptionError, match="strategy 'every-other' is unknown; choose one of greedy, angular"):
        prune(llama, "nowhere", SearchOptions(strategy="every-other"), settings=RunSettings())


def test_what_is_not_given_is_the_strategy_s() -> None:
    assert complete(SearchOptions(strategy="laco")).threshold == 0.65
    assert complete(SearchOptions(2)).strategy == "laco"
    once = complete(SearchOptions(strategy="angular", target_layers=3))
    assert complete(once) == once
    assert ignored_settings(complete(SearchOptions(strategy="angular", target_layers=3, merges_per_round=2))) == [
        "merges per round = 2 is ignored by strategy angular"
    ]


def test_names_of_strategies_are_known_to_strategies_alone() -> None:
    """Elsewhere nothing is decided by which strategy it is. Names in sentences and as defaults of a verb may stand."""
    for path in PACKAGE.rglob("*.py"):
        if "searches" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.match_case):
                named = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
                assert not set(strategies()) & {name for name in named if isinstance(name, str)}, (path, node.lineno)


def test_only_greedy_search_is_followed_by_a_repair_and_quick_is_not() -> None:
    usual = {name: usual_repair(complete(SearchOptions(strategy=name, target_layers=3))) for name in strategies()}
    assert usual == dict.fromkeys(strategies(), "none") | {"greedy": "auto"}
    assert [usual_repair(complete(SearchOptions(effort=effort))) for effort in EFFORTS] == ["none", "auto", "auto"]
