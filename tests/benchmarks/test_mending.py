"""bench_mending.py on the model that ships, rehearsed with short texts and this interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


def test_rehearsal(monkeypatch, tmp_path, capsys):
    import bench_mending

    short = {kind: text[:2000] for kind, text in bench_mending.held_out().items()}
    monkeypatch.setattr(bench_mending, "held_out", lambda: short)
    monkeypatch.setattr(bench_mending, "python_with", lambda *asked: Path(sys.executable))
    save = tmp_path / "mending.json"
    few = ["--methods", "replaceme", "streamline", "--rates", "1e-4", "--tokens", "256", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_mending.py", "--save", str(save), *few, "--repair-tokens", "4096"])
    bench_mending.main()
    document = json.loads(save.read_text(encoding="utf-8"))
    mapped, trained = document["rows"]
    assert [row["why_not"] for row in document["rows"]] == [None, None]
    assert mapped["found"]["layers"] == trained["found"]["layers"] == 18
    assert mapped["found"]["parameters"] == trained["found"]["parameters"]
    assert set(mapped["found"]["losses"]) == {"encyclopedia", "code", "documentation"}
    dense = {"dense": dict.fromkeys(mapped["found"]["losses"], 4.0), "rows": []}
    assert "| streamline, rate 0.0001 | 18 |" in bench_mending.table(document, [dense])
    assert "replaceme" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [18, 12])
def test_as_many_parameters_as_the_pruned_model_has(layers, tmp_path):
    import bench_mending
    from transformers import AutoModelForCausalLM

    from streamcollapse import RunSettings, SearchOptions, prune
    from streamcollapse.run.opened import open_job
    from streamcollapse.settings.run import Repair
    from tests.checkpoints import BUNDLED

    how = SearchOptions(strategy="block-influence", target_layers=layers)
    prune(BUNDLED, tmp_path / "out", how, settings=RunSettings(repair=Repair("none")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = bench_mending.num_parameters(open_job(BUNDLED, RunSettings()), layers)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
