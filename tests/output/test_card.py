"""The model card: what it takes over from the source's card, and what it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from streamcollapse.merge.plan import Plan, original_layers
from streamcollapse.output.card import model_card

REPORT = {
    "layers": {"before": 2, "after": 2},
    "parameters": {"before": 10, "after": 10},
    "bytes": {"before": 20, "after": 20},
    "ratio": 0.0,
    "versions": {"streamcollapse": "0"},
}


def card(tmp_path: Path, source: str, name: str = "a model") -> tuple[str, dict[str, object]]:
    (tmp_path / "source.md").write_text(source)
    text = model_card(Plan(name, 2, "0", original_layers(2), False, None), REPORT, tmp_path / "source.md")
    (tmp_path / "card.md").write_text(text)
    return text, metadata_load(tmp_path / "card.md") or {}


def test_licence_and_language_are_carried_over(tmp_path: Path) -> None:
    _, data = card(tmp_path, "---\nlicense: mit\nlanguage:\n- en\n- de\nwidget: []\n---\nHello")
    assert (data["license"], data["language"]) == ("mit", ["en", "de"])
    assert "widget" not in data


@pytest.mark.parametrize(
    "source",
    [
        "no header",
        "---\n- a\n- list\n---\n",
        "---\nlicense: {a: b}\nlanguage: [[en]]\nlicense_name: 3\n---\n",
        "---\nlicense: " + "a" * 1000 + "\n---\n",
        '---\nlicense: "\\e[2J"\n---\n',
        "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
        "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: [*b, *b]\n---\n",
        "---\nlicense: " + "[" * 5000 + "\n---\n",
    ],
)
def test_what_is_no_plain_word_is_left_out(tmp_path: Path, source: str) -> None:
    _, data = card(tmp_path, source)
    assert {*data} == {"base_model", "library_name", "pipeline_tag", "tags"}


def test_a_card_that_is_a_pipe_or_endless_is_not_read(tmp_path: Path) -> None:
    plan = Plan("m", 2, "0", original_layers(2), False, None)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "license" not in model_card(plan, REPORT, tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.write(b"---\nlicense: mit\n---\n")
        file.truncate(1 << 36)
    assert "license" not in model_card(plan, REPORT, tmp_path / "large")


def test_names_are_quoted_without_what_markdown_acts_on(tmp_path: Path) -> None:
    text, data = card(tmp_path, "", "a](http://x) <script>\n---\nlicense: mit\n# `b`|c")
    assert data["base_model"] == "a](http://x) <script>\n---\nlicense: mit\n# `b`|c", "YAML quotes it"
    body = text.split("---", 2)[2]
    assert not {*"<>[`"} & {*body.splitlines()[2]}
    assert "license" not in data
