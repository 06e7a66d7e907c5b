"""The model card (README.md) of a pruned checkpoint."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from streamcollapse.merge.composing import in_words
from streamcollapse.merge.plan import Plan
from streamcollapse.merge.record import SearchRecord
from streamcollapse.output.report import Report
from streamcollapse.output.verdict import told
from streamcollapse.searches.registry import strategies
from streamcollapse.searches.words import is_exchange, is_scale
from streamcollapse.units import format_bytes

_MOST_BYTES = 10_000_000  # of a card that is read
_MOST_WORDS, _LONGEST = 200, 200
_CARRIED = ("language", "license", "license_name", "license_link")


def model_card(plan: Plan, report: Report, source_card: Path) -> str:
    """The card's text. Licence and language come from ``source_card`` where it exists and can be read."""
    data = ModelCardData(
        base_model=plan.source_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["streamcollapse", "layer-collapse", "laco", "depth-pruning"],
        ignore_metadata_errors=True,
        **_carried(source_card),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(plan, report)}"


def _carried(source_card: Path) -> dict[str, Any]:
    """What the card says of licence and language, where it says it in a few plain words."""
    try:
        if not source_card.is_file() or source_card.stat().st_size > _MOST_BYTES:
            return {}
        data = metadata_load(source_card)
    except (OSError, ValueError, YAMLError, RecursionError):  # a card that cannot be read says nothing of its licence
        return {}
    return {key: data[key] for key in _CARRIED if _is_plain(data.get(key))} if isinstance(data, dict) else {}


def _is_plain(value: object) -> bool:
    words = value if isinstance(value, list) else [value]
    if not 0 < len(words) <= _MOST_WORDS:
        return False
    return all(isinstance(word, str) and word.isprintable() and 0 < len(word) <= _LONGEST for word in words)


def _body(plan: Plan, report: Report) -> str:
    layers, parameters, size = report["layers"], report["parameters"], report["bytes"]
    name = _plain(plan.source_name)
    lines = [
        f"# {name}, " + (f"{layers['after']} of {layers['before']} layers" if plan.heal is None else "healed"),
        "",
        f"{_made(plan, name)}made with StreamCollapse {report['versions']['streamcollapse']}. "
        f"{_trained(plan)}: measure before use.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| decoder layers | {layers['before']} | {layers['after']} |",
        f"| parameters | {parameters['before']:,} | {parameters['after']:,} |",
        f"| weights | {format_bytes(size['before'])} | {format_bytes(size['after'])} |",
        "",
        f"{100 * report['ratio']:.1f} % of the parameters were removed.",
    ]
    if judgement := report.get("held_out"):
        lines += [
            "",
            f"On held-out text ({_plain(judgement['text'])}, {judgement['tokens']} tokens), {told(judgement)}.",
        ]
    search = plan.search
    lines += ["", f"{in_words(plan).capitalize()}." if search is None else _method(search)]
    lines += ["", "Every layer as a mix of the source's layers: `streamcollapse_plan.json`. What the run cost: "]
    lines[-1] += "`streamcollapse_report.json`."
    return "\n".join(lines) + "\n"


def _made(plan: Plan, name: str) -> str:
    if plan.heal is not None:
        return f"This is {name} healed by distillation from {_plain(plan.heal.teacher)}, "
    return f"This is {name} with its depth pruned by layer collapse ([LaCo](https://arxiv.org/abs/2402.11187)), "


def _trained(plan: Plan) -> str:
    if plan.heal is not None:
        trained = f"adapters of rank {plan.heal.rank}" if plan.heal.rank else f"layers, {plan.heal.train}"
        return f"Trained were {trained} on {plan.heal.tokens} tokens of {_plain(plan.heal.text)}"
    if plan.repair is None or not plan.repair.is_kept:
        return "It was not trained afterwards"
    layers = ", ".join(str(layer.base) for layer in plan.layers if layer.refits)
    return (
        f"Layers before cuts ({layers} of the source) were fitted to the source's hidden states, nothing else trained"
    )


def _method(search: SearchRecord) -> str:
    """How the layers were found, in a sentence."""
    merges = [d for d in search.decisions if not is_scale(d) and not is_exchange(d)]
    decided = f"{sum(d.accepted for d in merges)} of {len(merges)} candidates accepted"
    options = search.options
    strategy = strategies().get(options.strategy)
    said = [f"Strategy `{options.strategy}`", f"rule `{options.rule}`", f"metric `{options.metric}`"]
    if strategy is not None and strategy.uses("layers_per_merge", options):
        said.append(f"C = {options.layers_per_merge}, I = {options.interval}")
    said.append(f"L = {options.lowest}, H = {options.highest}")
    if strategy is not None and strategy.uses("threshold", options):
        said[-1] += f", T = {options.threshold}"
    if options.rescale:
        said.append("layers rescaled")
    return f"{', '.join(said)}; {decided}."


def _plain(text: str) -> str:
    """``text`` without anything that Markdown or HTML would act on."""
    return re.sub(r"[^\w.,\-/ ]", "_", text)
