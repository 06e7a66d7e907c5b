"""Writes the pages of the documentation that are made from the code: options, strategies, families.

    python docs/generate.py          writes docs/options.md, docs/strategies.md, docs/families.md

A test holds the pages to what this makes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from streamcollapse.searches.registry import strategies  # noqa: E402
from streamcollapse.settings.catalogue import BEST, METRICS, RULES  # noqa: E402
from streamcollapse.settings.declared import Declared, declared  # noqa: E402
from streamcollapse.settings.evaluate import Evaluating  # noqa: E402
from streamcollapse.settings.heal import AlsoHeal, Healing  # noqa: E402
from streamcollapse.settings.run import (  # noqa: E402
    BenchConditions,
    Calibration,
    Cluster,
    Comparing,
    Compute,
    EvaluationText,
    Judging,
    Output,
    Repair,
    RunSettings,
    Streaming,
)
from streamcollapse.settings.search import SearchOptions  # noqa: E402
from tests.families import page as families_page  # noqa: E402

_GROUPS = (
    (SearchOptions, "The method", "`prune`, `search` and `bench`; keys of a job in `batch`."),
    (Calibration, "Calibration samples", "`prune`, `search`, `similarity` and `bench`; keys of a job in `batch`."),
    (
        Compute,
        "Computing",
        "Every verb that computes, `apply` only the device; `compute_dtype` is a key of a job in `batch`.",
    ),
    (
        Streaming,
        "Streaming",
        "`prune`, `search`, `similarity`, `bench`; `heal` and `batch` without `lookahead`; of `apply` the budgets. "
        "Nothing here changes what a search finds. With too little memory a repair that nobody asked for, the last "
        "step of `auto` or the verdict is left out, with a warning.",
    ),
    (Repair, "Repair", "`prune`, `search` and `apply`; keys of a job in `batch`."),
    (AlsoHeal, "Healing at once", "`prune` and `apply`; keys of a job in `batch`."),
    (Healing, "Healing", "`heal`."),
    (Judging, "The verdict", "`prune`, `apply` and `heal`; `held_out` also `search`; keys of a job in `batch`."),
    (Output, "Output", "`prune`, `apply`, `heal` and `convert`; `max_shard_size` is a key of a job in `batch`."),
    (RunSettings, "All of these, and trust", "Every verb that opens a model."),
    (EvaluationText, "Text to predict", "`perplexity`."),
    (Evaluating, "Tasks", "`evaluate`."),
    (Comparing, "Comparing plans", "`compare` and `report`."),
    (BenchConditions, "Conditions of a measurement", "`bench`."),
    (Cluster, "Workers", "`batch`."),
)


def options_page() -> str:
    """Every setting with its option, key, letter, default and meaning."""
    lines = [
        "# Options",
        "",
        "Made from the declarations in `streamcollapse/settings/` by `docs/generate.py`. The same names are options on",
        "the command line, keys in a file of jobs (with `_` for `-`; also the paper's letters) and fields in Python.",
    ]
    for cls, title, where in _GROUPS:
        lines += ["", f"## {title}", "", where, "", f"In Python: `{cls.__name__}`.", ""]
        lines += _table(
            ("option", "paper", "default", "meaning"), (_row(one) for one in declared(cls).values() if one.owner is cls)
        )
    return "\n".join(lines) + "\n"


def _row(setting: Declared) -> Sequence[str]:
    flags = f"`{setting.flag}`"
    if setting.said.letter:
        flags += f", `-{setting.said.letter}`"
    if setting.said.off:
        flags += f" / `{setting.said.off}`"
    meaning = setting.said.help
    if setting.choices:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in setting.choices)}."
    return flags, setting.said.letter, setting.default_text, meaning


def strategies_page() -> str:
    """Every strategy, metric and rule: what it does, where it is from, what it costs."""
    lines = [
        "# Strategies, metrics and rules",
        "",
        "Made from the strategies themselves (`streamcollapse/searches/strategies/`) by `docs/generate.py`;",
        "`streamcollapse strategies` prints the same. What they come to: [quality](quality.md).",
        "",
        "## Strategies",
        "",
        "Model reads are multiples of the checkpoint that reference pass and search read.",
        "",
    ]
    known = declared(SearchOptions)
    rows = []
    for name, one in strategies().items():
        defaults = [f"`{known[key].flag[2:]}` {_value(value)}" for key, value in one.defaults.items()]
        needs = "; needs a target" if one.needs_target else ""
        rows.append((f"`{name}`", one.summary + needs, one.source, one.cost, ", ".join([*defaults, one.samples])))
    lines += _table(("strategy", "what it does", "source", "model reads", "goes by, with its defaults"), rows)
    lines += ["", "## Metrics", "", "1 is the same as the original.", ""]
    lines += _table(("metric", "similarity", "source"), [(f"`{n}`", m.summary, m.source) for n, m in METRICS.items()])
    lines += ["", "## Rules", "", f"Several with commas compete for each candidate; `{BEST}` is all of them.", ""]
    lines += _table(("rule", "the merged layer"), [(f"`{name}`", does) for name, does in RULES.items()])
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


PAGES = {"options.md": options_page, "strategies.md": strategies_page, "families.md": families_page}


def main() -> None:
    """Write every page."""
    for name, make in PAGES.items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
