"""The verdict on a result, by what transformers makes of it; and searches that go as far as the loss lets them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from streamcollapse import SearchOptions, apply, prune, search
from streamcollapse.cli.main import app
from streamcollapse.errors import CalibrationError, OptionError
from streamcollapse.forward.perplexity import Perplexity
from streamcollapse.output.verdict import judge
from streamcollapse.progress import Event, WarningRaised
from streamcollapse.run.held_out import held_out_text
from streamcollapse.run.opened import open_job
from streamcollapse.searches.course import course
from streamcollapse.settings.run import Calibration, Compute, Judging, RunSettings

FLOAT32 = Compute("cpu", "float32")
SETTINGS = RunSettings(FLOAT32)
RUN = ["--device", "cpu", "--compute-dtype", "float32"]
DROP = SearchOptions(strategy="block-influence", target_layers=5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held.txt"
    path.write_text("The river rises in the hills and runs east. A ship sailed; the old town burned.\n" * 4)
    return path


def _loss(directory: Path, source: Path, text: Path) -> float:
    """By transformers, over the windows of the held-out text."""
    windows = held_out_text(open_job(source, SETTINGS), text).windows
    model, total, tokens = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), 0.0, 0
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor(window.token_ids)
            logits = model(ids.unsqueeze(0)).logits[0, -1 - window.predicted : -1]
            total += float(functional.cross_entropy(logits, ids[-window.predicted :], reduction="sum"))
            tokens += window.predicted
    return total / tokens


def test_it_is_what_transformers_makes_of_the_result(llama: Path, text: Path, tmp_path: Path) -> None:
    settings = RunSettings(FLOAT32, judging=Judging(text))
    pruned = prune(llama, tmp_path / "out", DROP, settings=settings)
    found: Any = json.loads((tmp_path / "out" / "streamcollapse_report.json").read_text())["held_out"]
    assert found == pruned.report.get("held_out")
    before, after = _loss(llama, llama, text), _loss(tmp_path / "out", llama, text)
    assert found["loss"]["before"] == pytest.approx(before, abs=1e-4)
    assert found["loss"]["after"] == pytest.approx(after, abs=1e-4)
    assert found["rise"] == pytest.approx(after - before, abs=1e-4)
    assert found["perplexity"]["after"] == pytest.approx(math.exp(after), rel=1e-3)
    assert found["text"] == "held.txt"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"On held-out text (held.txt, {found['tokens']} tokens), {found['verdict']}: loss {before:.3f} ->" in card
    again = apply(llama, pruned.plan, tmp_path / "again", settings=settings)
    assert again.report.get("held_out") == found


@pytest.mark.parametrize(
    ("rise", "verdict"),
    [(-0.1, "usable"), (0.19, "usable"), (0.3, "needs healing"), (2.1, "broken: do not use"), (math.inf, "broken")],
)
def test_the_words(rise: float, verdict: str) -> None:
    found = judge("text", Perplexity(3.0, 10), Perplexity(3.0 + rise, 10))
    assert found["verdict"].startswith(verdict)
    json.dumps(found, allow_nan=False)


def test_a_text_that_is_not_there_and_none_that_is_asked(llama: Path, tmp_path: Path) -> None:
    named = RunSettings(FLOAT32, judging=Judging(tmp_path / "none.txt"))
    with pytest.raises(CalibrationError, match=r"none\.txt: cannot be read"):
        prune(llama, tmp_path / "out", DROP, settings=named)
    assert not (tmp_path / "out").exists()
    silent = prune(llama, tmp_path / "out", DROP, settings=RunSettings(FLOAT32, judging=Judging(verdict=False)))
    assert silent.report.get("held_out") is None
    assert "held-out" not in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_is_applied_where_there_is_no_tokenizer(llama: Path, tmp_path: Path) -> None:
    plan, bare, warnings = search(llama, DROP, settings=SETTINGS), tmp_path / "bare", list[str]()
    bare.mkdir()
    for path in llama.iterdir():
        if "token" not in path.name:
            (bare / path.name).write_bytes(path.read_bytes())

    def listener(event: Event) -> None:
        if isinstance(event, WarningRaised):
            warnings.append(event.text)

    done = apply(bare, plan, tmp_path / "out", settings=SETTINGS, listener=listener)
    assert done.report.get("held_out") is None
    assert len(warnings) == 1
    assert warnings[0].startswith("no verdict: ")


def test_the_command_line_ends_with_3_and_keeps_the_output(llama: Path, text: Path, tmp_path: Path) -> None:
    command = ["prune", str(llama), "--out", str(tmp_path / "out"), "--strategy", "block-influence", *RUN]
    command += ["--target-layers", "2", "--held-out", str(text), "--max-loss", "1e-6"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3, done.output
    assert "error: more than --max-loss 1e-06: " in done.stderr
    assert "verdict" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    plan = tmp_path / "out" / "streamcollapse_plan.json"
    applying = ["apply", str(llama), str(plan), "--out", str(tmp_path / "b"), "--device", "cpu", "--json"]
    for limit, code in (("1e-6", 3), ("1000", 0)):
        done = CliRunner().invoke(app, [*applying, "--overwrite", "--held-out", str(text), "--max-loss", limit])
        assert done.exit_code == code, done.output
        assert json.loads(done.stdout)["held_out"]["text"] == "held.txt"


@pytest.mark.parametrize("strategy", ["block-influence", "angular", "greedy"])
def test_as_far_as_the_loss_lets_it(bundled: Path, strategy: str, text: Path, tmp_path: Path) -> None:
    settings = RunSettings(FLOAT32, Calibration("sentences"), judging=Judging(text))
    options = SearchOptions(strategy=strategy, rescale=False, lowest=8)
    if strategy == "greedy":
        options = options.but(effort="quick")

    def rise(size: int) -> float:
        plan, out = search(bundled, options.but(target_layers=size), settings=settings), tmp_path / str(size)
        judgement = apply(bundled, plan, out, settings=settings).report.get("held_out")
        assert judgement is not None
        assert judgement["rise"] is not None
        return judgement["rise"]

    limit = max(rise(23), rise(22), 0.0) + 1e-3  # so that 22 layers are within it
    found = search(bundled, options.but(max_loss=limit), settings=settings)
    assert found.num_layers <= 22
    for size in range(found.num_layers, 22):
        assert rise(size) <= limit
    assert rise(found.num_layers - 1) > limit
    if strategy == "greedy":
        assert len(course(found)) == 25 - found.num_layers
        assert found.search is not None
        assert "the loss on held-out text would rise by" in str(found.search.decisions[-1].reason)


def test_strategies_that_cannot_go_by_the_loss(llama: Path) -> None:
    with pytest.raises(OptionError, match="strategy laco cannot go by the loss; give `target_layers` with `max_loss`"):
        search(llama, SearchOptions(strategy="laco", max_loss=0.1), settings=SETTINGS)
