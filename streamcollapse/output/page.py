"""One HTML page about results of one source: self-contained, without scripts, readable in print and in the dark.

What comes from files is escaped where elements are made (drawings.py).
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from streamcollapse.merge.composing import in_words
from streamcollapse.merge.healed import HealRecord
from streamcollapse.merge.plan import Plan
from streamcollapse.merge.record import Decision, SearchRecord
from streamcollapse.output.drawings import Element, Point, chart, element, shares, stack_drawing
from streamcollapse.output.report import versions
from streamcollapse.output.results import ComparedModel, Comparison, Result
from streamcollapse.output.verdict import told
from streamcollapse.searches.words import is_exchange, is_scale, said_of, spoken_strategy
from streamcollapse.units import format_bytes, format_seconds

_MANY = 40  # decisions that are listed openly
_ALLOWED = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Sample:
    """What the models ``said`` after ``prompt``: the name of each, and its text."""

    prompt: str
    said: Sequence[tuple[str, str]]


def build_page(results: Sequence[Result], comparison: Comparison | None, samples: Sequence[Sample]) -> str:
    """The page about ``results``, which are of one source; with what a ``comparison`` has measured, if any."""
    plan, css = results[0].plan, resources.files("streamcollapse.data").joinpath("page.css").read_text(encoding="utf-8")
    style = element("style")
    style.text = css
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_ALLOWED),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{plan.source_name}, pruned"),
        style,
    )
    body = element(
        "body",
        element("h1", f"{plan.source_name}, pruned"),
        element(
            "p", f"{plan.num_source_layers} layers, fingerprint ", element("code", plan.fingerprint), class_="soft"
        ),
        *_overview(results, comparison),
        *(_section(result) for result in results),
        *_samples(samples),
        element(
            "footer",
            "This page was made with ",
            ", ".join(f"{name} {version}" for name, version in versions().items()),
            "." if any(_is_fitted(result.plan) for result in results) else ". Nothing was trained after pruning.",
        ),
    )
    return (
        f"<!DOCTYPE html>\n{ElementTree.tostring(element('html', head, body, lang='en'), 'unicode', method='html')}\n"
    )


def _is_fitted(plan: Plan) -> bool:
    return plan.heal is not None or any(layer.refits for layer in plan.layers)


def _table(headings: Sequence[str], rows: Iterable[Element], right: int, caption: str = "") -> Element:
    """A table whose columns from ``right`` on are numbers."""
    heads = (element("th", text, class_="number" if n >= right else "") for n, text in enumerate(headings))
    note = element("caption", caption) if caption else None
    table = element("table", note, element("thead", element("tr", *heads)), element("tbody", *rows))
    return element("div", table, class_="wide")


def _row(cells: Sequence[str], right: int, class_: str = "") -> Element:
    texts = (element("td", text, class_="number" if n >= right else "") for n, text in enumerate(cells))
    return element("tr", *texts, class_=class_)


def _overview(results: Sequence[Result], comparison: Comparison | None) -> list[Element]:
    """All models in a table, and loss against size."""
    if comparison is None:
        rows = [_row((r.name, said_of(r.plan), str(r.plan.num_layers)), 2) for r in results]
        return [_table(("model", "method", "layers"), rows, 2, "Nothing was measured: the source was not at hand.")]
    headings = ("model", "method", "layers", "weights", "of it", "loss", "rise", "perplexity")
    whole, where = comparison.models[0].num_bytes, comparison.compute
    caption = (
        f"Loss in nats per token, on {comparison.tokens:,} tokens of the text {comparison.text}, computed on "
        f"{where['device']} in {where['dtype']}."
    )
    rows = [_row(_figures(model, whole), 2) for model in comparison.models]
    found = [_table(headings, rows, 2, caption)]
    points = [(100 * m.num_bytes / whole, m.nll, m.name) for m in comparison.models if m.nll is not None]
    if len(points) > 1:
        axes = ("size of the weights, % of the source", "loss, nats per token")
        found += [element("h3", "Loss against size"), element("figure", chart(points, axes, "Loss against size"))]
    return found


def _figures(model: ComparedModel, whole: int) -> list[str]:
    size = [format_bytes(model.num_bytes), f"{100 * model.num_bytes / whole:.1f} %"]
    losses = ["overflows", "", ""]
    if model.nll is not None and model.rise is not None and model.perplexity is not None:
        losses = [f"{model.nll:.4f}", f"{model.rise:+.4f}", f"{model.perplexity:.2f}"]
    return [model.name, model.method, str(model.layers), *size, *losses]


def _section(result: Result) -> Element:
    """All that is known of one result."""
    plan = result.plan
    figure = element(
        "figure",
        stack_drawing(plan),
        element("figcaption", f"Above the source's layers, below those of the result. {in_words(plan).capitalize()}."),
    )
    judgement = None if result.report is None else result.report.get("held_out")
    return element(
        "section",
        element("h2", result.name),
        element("p", f"{said_of(plan)}: {plan.num_source_layers} layers to {plan.num_layers}.", class_="soft"),
        None if not judgement else element("p", f"Judged when it was made: {told(judgement)}.", class_="verdict"),
        figure,
        *([] if plan.search is None else _search(plan.search, plan.num_source_layers)),
        *([] if plan.heal is None or result.report is None else _healing(plan.heal, result.report)),
        *([] if result.report is None else _usage(result.report)),
    )


def _healing(record: HealRecord, report: Mapping[str, Any]) -> list[Element]:
    """What was trained, and how the loss on what was held out went down."""
    words = record.in_words()
    found = [element("h3", "Healing"), element("p", f"{words[0].upper()}{words[1:]}.")]
    judged = report.get("healing", {}).get("judged", {})
    points = [(float(step), loss, f"after step {step}") for step, loss in judged.items()]
    if len(points) > 1:
        found.append(element("figure", chart(points, ("steps", "loss on held-out text"), "Healing", joined=True)))
    return found


def _search(search: SearchRecord, num_layers: int) -> list[Element]:
    """The decisions in order, and how similarity went down with the layers that they took."""
    found, strategy = [element("h3", "Decisions, in order")], spoken_strategy(search.options)
    points, left = list[Point](), num_layers
    for decision in search.decisions:
        is_step = decision.accepted and not is_scale(decision) and not is_exchange(decision)
        if is_step and decision.similarity is not None:
            left -= max(decision.merged, 1)
            points.append((left, decision.similarity, strategy.layers_of(decision)))
    if len(points) > 1 and "metric" in strategy.defaults:  # the others judge a layer, not what has become of the model
        labels = ("layers left", f"similarity, {search.options.metric}")
        found.append(element("figure", chart(points, labels, "Similarity against layers left", joined=True)))
    headings = ("", "where", "verdict", *(("rule",) if any(d.rule for d in search.decisions) else ()), "similarity")
    right = len(headings) - 1
    rows = [_decision(number, decision, search, right) for number, decision in enumerate(search.decisions, 1)]
    if len(rows) <= _MANY:
        return [*found, _table(headings, rows, right)]
    taken = [_decision(number, d, search, right) for number, d in enumerate(search.decisions, 1) if d.accepted]
    summary = element("summary", f"All {len(rows)} decisions")
    return [*found, _table(headings, taken, right), element("details", summary, _table(headings, rows, right))]


def _decision(number: int, decision: Decision, search: SearchRecord, right: int) -> Element:
    """A row whose last column is ``right``; with fewer than five columns, none of them is the rule."""
    strategy = spoken_strategy(search.options)
    where = f"layer {decision.l - 1}" if is_scale(decision) else strategy.layers_of(decision)
    where = "" if is_exchange(decision) else where
    similarity = "" if decision.similarity is None else f"{decision.similarity:.4f}"
    if decision.similarity is None:
        verdict = f"skipped, {decision.reason}"
    else:
        verdict = strategy.verdict if decision.accepted else "rejected"
        verdict = "rescaled" if is_scale(decision) else "exchanged" if is_exchange(decision) else verdict
    cells = (str(number), where, verdict, decision.rule or "")[:right]
    return _row((*cells, similarity), right, "taken" if decision.accepted else "")


def _usage(report: Mapping[str, Any]) -> list[Element]:
    """Where time and memory went, and what made the model, as its report says."""
    usage, phases = report["usage"], [p for p in report["usage"]["phases"] if _number(p, "seconds") is not None]
    rows = []
    for number, phase in enumerate(phases):
        key = element("span", class_=f"key part{number % 6}")
        seconds = (_number(phase, name) for name in ("seconds", "seconds_waiting"))
        held = (_number(phase, name) for name in ("bytes_read", "bytes_written", "peak_rss", "peak_vram"))
        figures = [*("" if s is None else format_seconds(s) for s in seconds)]
        figures += ["" if size is None else format_bytes(size) for size in held]
        cells = (element("td", text, class_="number") for text in figures)
        rows.append(element("tr", element("td", key, str(phase.get("name"))), *cells))
    headings = ("phase", "time", "waiting for weights", "read", "written", "peak memory", "peak GPU memory")
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    bar = shares([(str(p.get("name")), _number(p, "seconds") or 0.0) for p in phases], "Time by phase")
    terms = [("computed on", ", ".join(report["compute"].values())), ("made with", made)]
    terms.append(("source", report["source"].get("path", "")))
    return [
        element("h3", f"Where {format_seconds(_number(usage, 'seconds') or 0.0)} and the memory went"),
        element("figure", bar),
        _table(headings, rows, 1),
        element("dl", *_terms(terms)),
    ]


def _number(figures: Mapping[str, Any], name: str) -> float | None:
    """The figure ``name``, where it is one: reports are files."""
    value = figures.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else None


def _terms(said: Sequence[tuple[str, str]]) -> list[Element]:
    return [part for name, value in said for part in (element("dt", name), element("dd", value))]


def _samples(samples: Sequence[Sample]) -> list[Element]:
    """What each model goes on with."""
    if not samples:
        return []
    found = [
        element("h2", "How they go on"),
        element(
            "p", "The most probable token each time, which repeats itself sooner than sampling does.", class_="soft"
        ),
    ]
    for sample in samples:
        found.append(element("h3", f"{sample.prompt} …"))
        found.append(element("blockquote", element("dl", *_terms(sample.said))))
    return found
