"""Results of bench_real.py, with those of bench_repair.py beside them, in words: a table in Markdown for each model,
and whether what is wanted is met."""

from __future__ import annotations

from typing import Any

from real_settings import groups, sizes

WITHIN = 1.03  # of the least rise
AT = (0.10, 0.20, 0.25)
SETTINGS = [one.name for group in groups() for one in (group.plain, group.exchanged, group.scaled) if one]
REPAIRED = "greedy standard, exchanges, repair"
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270M", "qwen2.5-coder": "Qwen2.5-Coder-1.5B"}


def title(document: dict[str, Any]) -> str:
    """What the model is called."""
    name: str = document["model"]
    return TITLES.get(name, name)


def rise(row: dict[str, Any]) -> float | None:
    """The mean over the kinds of text, in nats; None where it is not known."""
    return sum(row["rise"].values()) / len(row["rise"]) if "rise" in row else None


def _repaired(document: dict[str, Any]) -> dict[str, Any]:
    """A document of bench_repair.py as one of bench_real.py: a row for each size and way to repair."""
    rows = [
        {"setting": f"{REPAIRED} {row['method']}", "effort": "standard", "rescale": False, "status": "found"}
        | {"wanted": row["layers"], "layers": row["layers"], "rise": row["rise"], "cpu_seconds": None}
        for row in document["rows"]
        if document["cut"].startswith("greedy standard")
    ]
    return {**document, "layers": document["num_layers"], "rows": rows}


def together(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One document for each model. A row of a later file takes the place of an earlier one of its setting and size, and
    has no processor time, which is that of another machine or day."""
    found: dict[str, dict[str, Any]] = {}
    for document in (_repaired(one) if one.get("benchmark") == "repair" else one for one in documents):
        if document["model"] not in found:
            found[document["model"]] = document
            continue
        first = found[document["model"]]
        rows = {(row["setting"], row["wanted"]): row for row in first["rows"]}
        for row in document["rows"]:
            key = (row["setting"], row["wanted"])
            if key not in rows or row.get("plan") not in (None, rows[key].get("plan")):
                rows[key] = row | {"cpu_seconds": None}
        first["rows"] = sorted(rows.values(), key=lambda row: _place(row["setting"]))
    return list(found.values())


def _place(setting: str) -> int:
    """Where it stands in a table: repairs at the end."""
    return SETTINGS.index(setting) if setting in SETTINGS else len(SETTINGS)


def markdown(documents: list[dict[str, Any]]) -> str:
    """All of ``documents``."""
    models = together(documents)
    return "\n\n".join(part for document in models for part in (_table(document), *_verdicts(document)))


def _table(document: dict[str, Any]) -> str:
    rows, num_layers = document["rows"], document["layers"]
    wanted = sorted({row["wanted"] for row in rows}, reverse=True)
    timed = sizes(num_layers)[2]  # a quarter gone
    dense = ", ".join(f"{kind} {nll:.3f}" for kind, nll in document["dense"].items())
    lines = [
        f"**{title(document)}**, {num_layers} layers; loss of the original: {dense}.",
        "",
        "| layers that stay | " + " | ".join(map(str, wanted)) + f" | processor time to {timed} |",
        "|---" * (len(wanted) + 2) + "|",
    ]
    for name in dict.fromkeys(row["setting"] for row in rows):
        of_it = {row["wanted"]: row for row in rows if row["setting"] == name}
        cells = [_cell(of_it.get(n)) for n in wanted]
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {_seconds(of_it.get(timed))} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] != "found":
        return "refused" if row["status"].startswith("refused") else f"broken off at {row['reached']}"
    found = rise(row)
    said = "not scored" if found is None else f"{found:.3f}"
    return said if row["layers"] == row["wanted"] else f"{said} ({row['layers']})"


def _seconds(row: dict[str, Any] | None) -> str:
    known = row is not None and row["status"] == "found" and row["cpu_seconds"] is not None
    return f"{row['cpu_seconds']:.0f} s" if known and row is not None else ""


def _verdicts(document: dict[str, Any]) -> list[str]:
    """Whether the default, ``standard`` with exchanges and its repair where there are such rows, is as good as the best
    of all others of a size."""
    found = []
    for wanted in sizes(document["layers"], AT):
        rows = [row for row in document["rows"] if row["layers"] == wanted and rise(row) is not None]
        ours = [row for row in rows if row.get("effort") == "standard" and not row["rescale"]]
        if not ours:
            continue
        default = max(ours, key=lambda row: (_place(row["setting"]), row["setting"].endswith(("exchanges", "auto"))))
        others = [row for row in rows if row["setting"] != default["setting"]]
        if not others:
            continue
        best = min(others, key=lambda row: rise(row) or 0.0)
        least, loss = rise(best) or 0.0, rise(default) or 0.0
        verdict = "within 3 %" if loss <= WITHIN * least else f"{loss / least - 1.0:.0%} more: missed"
        found.append(
            f"{title(document)}, {wanted} layers: `{default['setting']}` {loss:.3f}, the least of all others "
            f"{least:.3f} (`{best['setting']}`): {verdict}."
        )
    return found
