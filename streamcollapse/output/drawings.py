"""Drawings of results as inline SVG, and the elements that pages are made of, which escape what they are given."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from streamcollapse.errors import printable
from streamcollapse.merge.plan import Plan, PlanLayer

Element = ElementTree.Element
Point = tuple[float, float, str]

_CELL, _ROW = 20.0, 16.0  # of the drawing of a stack
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 560.0, 280.0, 64.0, 44.0, 16.0  # of a chart


def element(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """An element with ``children``: a text is escaped, None is left out; ``class_`` is the attribute class, and
    an empty attribute is none."""
    said = {name.rstrip("_").replace("_", "-"): printable(value) for name, value in attributes.items() if value != ""}
    made = Element(tag, said)
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + printable(child)
        elif child is not None:
            made.text = (made.text or "") + printable(child)
    return made


def _svg(width: float, height: float, label: str, *children: Element) -> Element:
    return element(
        "svg",
        element("title", label),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        style=f"max-width: {width:g}px",
        xmlns="http://www.w3.org/2000/svg",
    )


def stack_drawing(plan: Plan) -> Element:
    """The source's layers above, those of the pruned model below, and which is made of which."""
    count, apart = plan.num_source_layers, 2.5 * _ROW
    used = {number for layer in plan.layers for number in layer.mix}
    parts = []
    for layer, place in zip(plan.layers, _places(plan), strict=True):
        for number in sorted(layer.mix):
            line = {"x1": (number + 0.5) * _CELL, "y1": _ROW, "x2": (place + 0.5) * _CELL, "y2": _ROW + apart}
            parts.append(element("line", class_=f"link {_kind(layer)}", **{k: f"{v:g}" for k, v in line.items()}))
        parts += _cell(place, _ROW + apart, _kind(layer), str(layer.base), f"{_made_of(layer)}")
    for number in range(count):
        kind, what = ("source", "stays") if number in used else ("gone", "dropped")
        parts += _cell(number, 0.0, kind, str(number), f"source layer {number}: {what}")
    label = f"{count} layers of the source above, {plan.num_layers} of the pruned model below"
    return _svg(count * _CELL, 2 * _ROW + apart, label, *parts)


def _places(plan: Plan) -> list[float]:
    """Where the layers of the pruned model stand: in the middle, side by side."""
    first = (plan.num_source_layers - plan.num_layers) / 2
    return [first + number for number in range(plan.num_layers)]


def _kind(layer: PlanLayer) -> str:
    if len(layer.mix) > 1:
        return "merged"
    if layer.refits:
        return "repaired"
    return "kept" if layer.untouched else "scaled"


def _made_of(layer: PlanLayer) -> str:
    made = " + ".join(f"{layer.mix[number]:.4g} of layer {number}" for number in sorted(layer.mix))
    return f"{made}, with {', '.join(sorted(layer.refits))} fitted anew" if layer.refits else made


def _cell(place: float, top: float, kind: str, number: str, title: str) -> list[Element]:
    left, wide = place * _CELL + 1, _CELL - 2
    box = element("rect", x=f"{left:g}", y=f"{top:g}", width=f"{wide:g}", height=f"{_ROW:g}", rx=2, class_=kind)
    box.append(element("title", title))
    middle, line = f"{place * _CELL + _CELL / 2:g}", f"{top + 0.72 * _ROW:g}"
    return [box, element("text", number, x=middle, y=line, text_anchor="middle", class_=f"in {kind}")]


def chart(points: Sequence[Point], labels: tuple[str, str], title: str, joined: bool = False) -> Element:
    """``points`` (x, y, what they are called) in a frame, ``joined`` by a line or not; ``labels`` of the two axes."""
    xs, ys = _span([x for x, _, _ in points]), _span([y for _, y, _ in points])
    width, height = _WIDTH - _LEFT - _MARGIN, _HEIGHT - _BOTTOM - _MARGIN

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - xs[0]) / (xs[1] - xs[0]), (y - ys[0]) / (ys[1] - ys[0])
        return round(_LEFT + across * width, 1), round(_MARGIN + (1 - up) * height, 1)

    parts, right, bottom = [], _WIDTH - _MARGIN, _HEIGHT - _BOTTOM
    for y in _ticks(*ys):
        down = at(xs[0], y)[1]
        parts.append(element("line", x1=_LEFT, y1=down, x2=right, y2=down, class_="grid"))
        parts.append(element("text", f"{y:g}", x=_LEFT - 6, y=down + 4, text_anchor="end"))
    beneath = [(x, at(x, ys[0])[0]) for x in _ticks(*xs)]
    parts += [element("text", f"{x:g}", x=across, y=bottom + 16, text_anchor="middle") for x, across in beneath]
    if joined:
        way = " ".join(f"{across:g},{down:g}" for across, down in (at(x, y) for x, y, _ in points))
        parts.append(element("polyline", points=way, class_="way"))
    for x, y, name in points:
        across, down = at(x, y)
        parts.append(element("circle", element("title", f"{name}: {x:.4g}, {y:.4g}"), cx=across, cy=down, r=4))
        if not joined:
            inside = across < _WIDTH - 150
            side = {"x": across + 8 if inside else across - 8, "text_anchor": "start" if inside else "end"}
            parts.append(element("text", name[:24], y=down - 6, **side))
    middle = _MARGIN + height / 2
    turned = element("text", labels[1], text_anchor="middle", transform=f"translate(14 {middle:g}) rotate(-90)")
    below = element("text", labels[0], x=_LEFT + width / 2, y=_HEIGHT - 6, text_anchor="middle")
    return _svg(_WIDTH, _HEIGHT, title, *parts, turned, below)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """From the smallest to the largest of ``values``, with a margin."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from ``low`` to ``high``, evenly apart."""
    power = math.floor(math.log10((high - low) / 5))
    step, digits = next((n * 10.0**power, 1 - power) for n in (1, 2, 2.5, 5, 10) if (high - low) / 7 <= n * 10.0**power)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, max(digits, 0)) for number in range(first, last + 1)]


def shares(parts: Sequence[tuple[str, float]], title: str) -> Element:
    """A bar that is divided as ``parts`` (what, how much) are, each at least wide enough to be seen."""
    total, left, made = sum(max(size, 0.0) for _, size in parts) or 1.0, 0.0, []
    for number, (name, size) in enumerate(parts):
        wide = max(size, 0.0) / total * _WIDTH
        what = element("title", f"{name}: {100 * max(size, 0.0) / total:.0f} %")
        made.append(
            element("rect", what, x=f"{left:.2f}", y=0, width=f"{wide:.2f}", height=_ROW, class_=f"part{number % 6}")
        )
        left += wide
    return _svg(_WIDTH, _ROW, title, *made)
