"""The page: well-formed, self-contained, and nothing from a file is acted on."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from streamcollapse import Calibration, Comparing, Compute, Plan, RunSettings, SearchOptions, make_plan, prune, report
from streamcollapse.cli.main import app
from streamcollapse.errors import OutputError, PlanError
from streamcollapse.jobs.report import PROMPTS
from streamcollapse.output.drawings import chart, stack_drawing
from streamcollapse.output.report import load_report
from streamcollapse.output.verdict import told
from streamcollapse.settings.run import Output
from tests.checkpoints import edit_json

FLOAT32 = RunSettings(Compute("cpu", "float32"), Calibration("sentences"))
ODD = 'a <b> & "c" <script>alert(1)</script>'.replace("/", "")
VOID = {"meta"}


class _Strict(HTMLParser):
    """Fails where an element is not closed in its turn; keeps the tags and what is said."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.said = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.fixture(scope="module")
def pruned(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "pruned"
    prune(bundled, out, SearchOptions(strategy="block-influence", target_layers=20), settings=FLOAT32)
    return out


def test_the_page_has_everything_and_says_what_the_models_say(bundled: Path, pruned: Path, tmp_path: Path) -> None:
    make_plan(bundled, "2", ["9-11:mean"]).save(tmp_path / ODD)
    out = tmp_path / "page.html"
    found = report([pruned, tmp_path / ODD], out, conditions=Comparing(max_tokens=100), settings=FLOAT32)
    page = out.read_text(encoding="utf-8")
    parsed = _Strict(page)
    assert "script" not in parsed.tags
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page), "nothing is fetched"
    assert {"href", "src"}.isdisjoint(name for name, _ in parsed.attributes)
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(drawings) == 4, "loss against size, a stack each, and phases"
    for expected in (ODD, "wiki-llama-24l", "block-influence, 20 layers", "Decisions, in order", "reference", *PROMPTS):
        assert expected in parsed.said
    assert found.comparison is not None
    for model in found.comparison.models:
        assert f"{model.perplexity:.2f}" in parsed.said
    judged = load_report(pruned / "streamcollapse_report.json").get("held_out")
    assert judged is not None
    assert told(judged) in parsed.said
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    for directory, name in ((bundled, found.comparison.source), (pruned, "pruned")):
        whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for sample in found.samples:
            ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
            before = ids.shape[1]
            for _ in range(24):
                with torch.inference_mode():
                    ids = torch.cat([ids, whole(ids).logits[:, -1:].argmax(-1)], dim=1)
            theirs = " ".join(tokenizer.decode(ids[0, before:], skip_special_tokens=True).split())
            assert dict(sample.said)[name] == theirs
            assert theirs in parsed.said


def test_without_the_source_the_page_has_what_files_say(bundled: Path, tmp_path: Path) -> None:
    make_plan(bundled, "2").save(tmp_path / "p.json")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "p.json"), "--out", str(tmp_path / "page.html"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["comparison"] is None
    parsed = _Strict((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Nothing was measured: the source was not at hand." in parsed.said
    assert "Nothing was trained after pruning." in parsed.said
    assert parsed.tags.count("svg") == 1


def test_what_a_plan_and_a_report_say_is_never_acted_on(pruned: Path, tmp_path: Path) -> None:
    bad = "</style><img src=x onerror=alert(1)>&amp;\x1b[31m\udc80"
    directory = tmp_path / "odd"
    directory.mkdir()
    for name in ("streamcollapse_plan.json", "streamcollapse_report.json"):
        (directory / name).write_bytes((pruned / name).read_bytes())
    edit_json(directory / "streamcollapse_plan.json", lambda plan: plan["source"].update(name=bad))

    def spoil(said: dict[str, dict[str, object]]) -> None:
        said["versions"]["torch"] = said["source"]["path"] = bad
        phases = said["usage"]["phases"]
        assert isinstance(phases, list)
        phases[0].update(name=bad, seconds_waiting="soon", bytes_read=None)

    edit_json(directory / "streamcollapse_report.json", spoil)
    report([directory], tmp_path / "page.html", settings=FLOAT32)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = _Strict(page)
    assert "img" not in parsed.tags
    assert "\x1b" not in page
    assert parsed.said.count("</style><img src=x onerror=alert(1)>&amp;\\x1b[31m\\udc80") >= 4


@pytest.mark.parametrize("values", [(0.2148, 0.3929), (0.0, 28.0), (94.0, 106.0), (5.0, 5.0), (-3.0, 4e6)])
def test_axes_have_round_numbers(values: tuple[float, float]) -> None:
    drawn = ElementTree.tostring(chart([(n, value, "here") for n, value in enumerate(values)], ("x", "y"), "title"))
    said = [float(text) for text in re.findall(r'text-anchor="end">([-+\d.e]+)<', drawn.decode())]
    assert 3 <= len(said) <= 8
    step = said[1] - said[0]
    assert np.allclose(np.diff(said), step)
    mantissa = step / 10 ** np.floor(np.log10(step) + 1e-9)
    assert np.isclose(mantissa, [1, 2, 2.5, 5], atol=1e-6).any(), said


def test_nothing_is_written_over_or_for_nothing(bundled: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "p.json", tmp_path / "page.html"
    make_plan(bundled, "2").save(plan)
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another `out` or pass `overwrite`"):
        report([plan], out)
    with pytest.raises(PlanError, match="cannot be read"):
        report([tmp_path / "none.json"], tmp_path / "other.html")
    with pytest.raises(OutputError, match="is not a directory; choose another `out`"):
        report([plan], plan / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "page.html"]
    report([plan], out, settings=RunSettings(output=Output(overwrite=True)))
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_a_stack_is_drawn_as_it_is(bundled: Path) -> None:
    plan: Plan = make_plan(bundled, "2", ["9-11:mean"])
    drawing = stack_drawing(plan)
    kinds = [rect.get("class") for rect in drawing.iter("rect")]
    assert [kinds.count(kind) for kind in ("kept", "merged", "scaled", "gone", "source")] == [20, 1, 0, 1, 23]
    titles = [title.text for title in drawing.iter("title")]
    assert "0.3333 of layer 9 + 0.3333 of layer 10 + 0.3333 of layer 11" in titles
    assert "source layer 2: dropped" in titles
    assert sum(line.get("class") == "link merged" for line in drawing.iter("line")) == 3


def test_points_stand_where_their_figures_are() -> None:
    drawing = chart([(50.0, 3.0, "a"), (100.0, 2.0, "b"), (75.0, 2.5, "c")], ("size", "loss"), "t")
    places = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in drawing.iter("circle")]
    (left, high), (right, low), (middle, between) = places
    assert left < middle < right
    assert high < between < low, "up is more"
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    same = chart([(1.0, 1.0, "a")], ("size", "loss"), "t")
    assert all(float(c.get("cx", "")) > 0 for c in same.iter("circle"))
