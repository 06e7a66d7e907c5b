"""bench_heal.py on the model that ships, rehearsed with short texts."""

from __future__ import annotations

import json
import sys

import pytest


def test_rehearsal(monkeypatch, tmp_path, capsys):
    import bench_heal
    import real_runs

    short = {kind: text[:2000] for kind, text in real_runs.held_out().items()}
    monkeypatch.setattr(real_runs, "held_out", lambda: short)
    save = tmp_path / "heal.json"
    few = ["--ways", "heal", "--tokens", "256", "--heal-tokens", "4096", "--threads", "1"]
    options = ["--options", "--rank 4 --length 64 --batch-tokens 512"]
    monkeypatch.setattr(sys, "argv", ["bench_heal.py", "--save", str(save), "--share", "0.1", *few, *options])
    bench_heal.main()
    document = json.loads(save.read_text(encoding="utf-8"))
    (row,) = document["rows"]
    assert (row["layers"], row["way"]) == (22, "heal")
    assert row["cut"].keys() == row["rise"].keys() == row["back"].keys() == {"encyclopedia", "code", "documentation"}
    for kind, share in row["back"].items():
        assert share == pytest.approx(1 - row["rise"][kind] / row["cut"][kind])
    assert row["record"]["rank"] == 4
    assert row["heal"]["seconds"] > 0
    assert "| bundled | 24 -> 22 | heal |" in bench_heal.table([document])
    assert "22 layers, heal" in capsys.readouterr().out
