"""bench_repair.py on the model that ships, rehearsed with short texts."""

from __future__ import annotations

import json
import sys

import pytest


def test_rehearsal(monkeypatch, tmp_path, capsys):
    import bench_repair
    import real_runs

    short = {kind: text[:2000] for kind, text in real_runs.held_out().items()}
    monkeypatch.setattr(real_runs, "held_out", lambda: short)
    save = tmp_path / "repair.json"
    few = ["--methods", "linear", "--tokens", "256", "--repair-tokens", "4096", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_repair.py", "--save", str(save), "--shares", "0.1", *few])
    bench_repair.main()
    document = json.loads(save.read_text(encoding="utf-8"))
    (row,) = document["rows"]
    assert (row["layers"], row["method"]) == (22, "linear")
    assert row["repair"]["is_kept"]
    assert row["cut"].keys() == row["rise"].keys() == row["back"].keys() == {"encyclopedia", "code", "documentation"}
    for kind, share in row["back"].items():
        assert share == pytest.approx(1 - row["rise"][kind] / row["cut"][kind])
    assert row["seconds"] > 0
    assert row["peak_rss"] > 0
    assert "| layers that stay | cut alone | linear |" in bench_repair.table([document])
    assert "22 layers, linear: taken back" in capsys.readouterr().out
