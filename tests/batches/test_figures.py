"""Jobs that measure, and what a dry run and the table say of jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from streamcollapse import Compute, EvaluationText, RunSettings, SearchOptions, perplexity, similarity
from streamcollapse.batches.figures import FIGURES_FILE
from streamcollapse.batches.run import batch
from streamcollapse.cli.main import app
from streamcollapse.errors import JobsError
from streamcollapse.settings.run import Calibration
from tests.batches.conftest import write_jobs


def test_a_perplexity_and_likeness_are_what_the_verbs_say(base: Path) -> None:
    (base / "held.txt").write_text("The river rises in the hills and runs east. " * 20)
    predict = {"source": "models/m0", "verb": "perplexity", "text": "held.txt", "window": [16, 32]}
    liken = {"source": "models/m1", "verb": "similarity", "layers_per_merge": 3, "rule": "mean"}
    jobs = write_jobs(base, [predict, {**liken, "calibration": "samples.txt"}])
    found = batch(jobs, base / "out", settings=RunSettings(Compute("cpu")))
    assert [outcome.status for outcome in found.outcomes] == ["done"] * 3
    settings = RunSettings(Compute("cpu", "float32"), Calibration(base / "samples.txt"))
    for outcome, window in zip(found.outcomes, (16, 32), strict=False):
        assert outcome.name == f"m0-perplexity-held-{window}-float32"
        score = perplexity(base / "models" / "m0", EvaluationText(base / "held.txt", window), settings=settings)
        document = json.loads((Path(outcome.out) / FIGURES_FILE).read_text())
        assert document["nll"] == score.nll
        assert outcome.figures is not None
        assert (outcome.figures["loss"], outcome.figures["tokens"]) == (score.nll, score.tokens)
    options = SearchOptions(layers_per_merge=3, rule="mean", strategy="laco")
    alike = similarity(base / "models" / "m1", options, settings=settings)
    document = json.loads((Path(found.outcomes[2].out) / FIGURES_FILE).read_text())
    assert document["merges"] == json.loads(json.dumps(alike.to_json()))["merges"]
    assert [one.status for one in batch(jobs, base / "out", settings=RunSettings(Compute("cpu"))).outcomes] == [
        "kept"
    ] * 3
    (base / "held.txt").write_text("A ship sailed. " * 40)
    again = batch(jobs, base / "out", settings=RunSettings(Compute("cpu")))
    assert [outcome.status for outcome in again.outcomes] == ["done", "done", "kept"]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"verb": "perplexity"}, "job 1: perplexity needs a text"),
        ({"verb": "perplexity", "text": "none.txt"}, r"none\.txt: there is no such text"),
        ({"verb": "perplexity", "text": "samples.txt", "threshold": 0.5}, "setting threshold is unknown"),
        ({"verb": "perplexty"}, "verb perplexty is unknown; did you mean perplexity"),
        ({"held_out": "none.txt"}, r"none\.txt: there is no such held-out text"),
    ],
)
def test_jobs_that_cannot_measure(base: Path, job: dict[str, object], message: str) -> None:
    with pytest.raises(JobsError, match=message):
        batch(write_jobs(base, [{"source": "models/m0", **job}]), base / "out")


def test_what_a_dry_run_and_the_table_say(base: Path) -> None:
    pruning = {"source": "models/m0", "strategy": "block-influence", "target_layers": -2}
    jobs = write_jobs(base, [{**pruning, "held_out": "samples.txt"}, {"source": "models/m1", "verb": "convert"}])
    command = ["batch", str(jobs), "--out", str(base / "out"), "--device", "cpu"]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    header, first, second = dry.stdout.splitlines()[:3]
    assert header.split() == ["result", "layers", "size", "memory"]
    assert "16 -> 14" in first
    assert first.split()[-1] == "MB"
    assert second.startswith("ready")
    assert not (base / "out").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].split() == [
        "result", "layers", "removed", "size", "memory", "loss", "perplexity", "verdict", "time",
    ]  # fmt: skip
    report = json.loads((base / "out" / "batch_report.json").read_text())
    judgement = report["jobs"][0]["figures"]["held_out"]
    assert judgement["text"] == "samples.txt"
    assert f"{judgement['rise']:+.3f}" in done.stdout
    assert judgement["verdict"] in done.stdout


def test_a_page_about_the_results_is_written_when_they_are_there(base: Path) -> None:
    pruning = {"source": "models/m0", "strategy": "block-influence", "target_layers": [14, 12], "verdict": False}
    jobs = write_jobs(base, [{"source": "models/m0", "verb": "report"}, pruning])
    found = batch(jobs, base / "out", settings=RunSettings(Compute("cpu")))
    assert [outcome.status for outcome in found.outcomes] == ["done"] * 3, found.report
    page, *results = found.outcomes
    assert page.figures == {"results": 2}
    text = (Path(page.out) / "streamcollapse_page.html").read_text()
    for result in results:
        assert result.name in text
    alone = write_jobs(base, [{"source": "models/m1", "verb": "report"}])
    (failed,) = batch(alone, base / "out", settings=RunSettings(Compute("cpu"))).outcomes
    assert failed.status == "failed"
    assert failed.error is not None
    assert "has no result of" in failed.error
