"""bench_real.py on a tiny model, rehearsed; its tables and verdicts on rows made up for them."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from streamcollapse import SearchOptions, search
from tests.checkpoints import save_llama

PLAIN, SCALED = "greedy quick", "greedy quick, scales"


@pytest.fixture
def source(tmp_path):
    return save_llama(tmp_path / "source")


@pytest.fixture
def rehearse(monkeypatch, tmp_path, source):
    """Runs the benchmark with tiny texts; returns its document."""
    import bench_real

    short = {kind: text[:500] for kind, text in bench_real.held_out().items()}
    monkeypatch.setattr(bench_real, "held_out", lambda: short)

    save = tmp_path / "real.json"

    def run(*more: str) -> dict[str, Any]:
        few = ["--tokens", "24", "--shares", "0.1", "0.25", "--scales-at", "0.1", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["bench_real.py", "--source", f"{source}", "--save", f"{save}", *few, *more])
        bench_real.main()
        return json.loads(save.read_text(encoding="utf-8"))

    run.save = save  # type: ignore[attr-defined]
    return run


def test_rehearsal(rehearse, source):
    document = rehearse("--only", PLAIN, SCALED)
    rows = {(row["setting"], row["wanted"]): row for row in document["rows"]}
    assert set(rows) == {(PLAIN, 7), (PLAIN, 6), (SCALED, 7)}
    for (_, wanted), row in rows.items():
        assert row["layers"] == wanted
        assert row["rise"].keys() == {"encyclopedia", "code", "documentation"}
    plain, scaled = rows[PLAIN, 7], rows[SCALED, 7]
    alone = search(source, SearchOptions(effort="quick", rescale=False, target_layers=7))
    assert plain["plan"] == [[layer.base, {f"{layer.base}": 1.0}] for layer in alone.layers]
    assert [base for base, _ in scaled["plan"]] == [base for base, _ in plain["plan"]]
    assert scaled["seconds"] > plain["seconds"] > 0
    assert rows[PLAIN, 6]["layers_read"] > plain["layers_read"] > 8
    assert rehearse("--only", PLAIN, SCALED) == document, "a second run has nothing to do"


def test_a_greedy_search_goes_on_where_it_had_come_to(rehearse):
    setting = "greedy thorough"
    whole = rehearse("--only", setting, "--scales-at")["rows"]
    rehearse.save.unlink()
    rehearse("--only", setting, "--scales-at", "--shares", "0.1")
    first, rest = rehearse("--only", setting, "--scales-at")["rows"]
    assert [row["plan"] for row in (first, rest)] == [row["plan"] for row in whole]
    assert rest["layers_read"] > first["layers_read"]


def test_a_search_that_is_broken_off_says_so(rehearse):
    (row,) = rehearse("--only", "greedy thorough", "--shares", "0.5", "--scales-at", "--limit", "0.01")["rows"]
    assert (row["status"], row["reached"], row["decisions"]) == ("broken off after 0.01 s", 8, [])


def row(setting: str, wanted: int, loss: float, **more: Any) -> dict[str, Any]:
    used = {"cpu_seconds": 9.0, "layers": wanted, "status": "found"}
    return {"setting": setting, "wanted": wanted, "rise": {"code": loss, "encyclopedia": loss}, **used, **more}


def test_the_table_and_the_verdict():
    from real_tables import markdown

    standard = {"effort": "standard", "rescale": False}
    rows = [
        row("laco", 9, 0.3, layers=10),
        row("laco", 8, 0.2),
        row("greedy standard", 9, 0.102, **standard),
        row("greedy standard", 8, 0.21, **standard),
        row("greedy quick", 9, 0.1),
        {"setting": "greedy quick", "wanted": 8, "status": "broken off after 9 s", "layers": None, "reached": 9},
    ]
    text = markdown([{"model": "smollm2", "layers": 10, "dense": {"code": 1.0, "encyclopedia": 2.0}, "rows": rows}])
    assert "| `laco` | 0.300 (10) | 0.200 |" in text
    assert "| `greedy quick` | 0.100 | broken off at 9 |" in text
    assert "9 layers: `greedy standard` 0.102, the least of all others 0.100 (`greedy quick`): within 3 %." in text
    assert "8 layers: `greedy standard` 0.210, the least of all others 0.200 (`laco`): 5% more: missed." in text


def test_files_of_one_model_are_one_table():
    from real_tables import markdown

    first = {"model": "smollm2", "layers": 10, "dense": {"code": 1.0, "encyclopedia": 2.0}}
    standard = {"effort": "standard", "rescale": False}
    stack, other = [[0, {"0": 1.0}]], [[1, {"1": 1.0}]]
    rows = [row("laco", 7, 0.2, plan=stack), row("greedy standard", 7, 0.21, plan=stack, **standard)]
    later = [
        row("greedy standard", 7, 0.22, plan=stack, **standard),  # the same stack, scored on another machine
        row("greedy standard, exchanges", 7, 0.19, plan=other, **standard),
        {"setting": "rule-based", "wanted": 7, "status": "refused: too little", "layers": None, "reached": 10},
    ]
    mended = [{"layers": 7, "method": "auto", "rise": {"code": 0.09, "encyclopedia": 0.11}}]
    repair = {"benchmark": "repair", "model": "smollm2", "num_layers": 10, "cut": "greedy standard", "rows": mended}
    text = markdown([first | {"rows": rows}, first | {"rows": later}, repair])
    assert text.count("**SmolLM2") == 1
    assert text.count("| `greedy standard, exchanges, repair auto` | 0.100 |  |") == 1
    assert "| `greedy standard` | 0.210 | 9 s |" in text
    assert "| `rule-based` | refused |  |" in text
    assert "| `greedy standard, exchanges` | 0.190 |  |" in text, "its time is of another day"
    assert "7 layers: `greedy standard, exchanges, repair auto` 0.100, the least of all others 0.190" in text
