"""How good, and how dear, is every strategy and every effort on real trained models?

Question   By how much does the loss on text rise that no search has seen, with about 10, 20, 25, 33 and 50 % of the
           layers gone; and what did finding them take?
Ceiling    No rise.
Wanted     At 10, 20 and 25 % the effort ``standard`` loses at most 3 % more than the best of all settings.
Method     A model of real_models.py; every strategy, those that have an effort with each, with scales and without, by
           their own defaults. The rise is in nats over the original's loss, on three kinds of text
           (real_models.held_out), in windows of 512 tokens spread evenly over each. A search is a process of its own.
           A nested one is run once, to the fewest layers: on its way it passes what a search for each other number
           finds, and its time up to there is that search's. A run that goes on to fewer layers begins with the last
           stack; its first round scores again what those before had left. Scales begin with the stack that the search
           without them found; their time is that search's, and their own with another reference pass.
           Processor time is that of all cores, bytes what was read of the checkpoint, layers how often one went by.

    python benchmarks/bench_real.py (--model NAME --models DIR | --source DIR) --save FILE [--only SETTING...]
                                    [--limit SECONDS] [--shares 0.1 0.2 ...] [--scales-at 0.2 0.25] [--tokens 4096]
                                    [--threads N] [--note TEXT]
    python benchmarks/bench_real.py --table FILE...

Each row is in FILE as soon as it is known, and a run with a FILE that is there goes on. ``--limit`` breaks off a search
after that time; what it had passed counts. ``--only``: names as the rows have them. ``--table`` prints results in
Markdown. The last line of stdout is one JSON document otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from about import environment
from real_models import add_options, chosen_model, held_out
from real_search import Searched, searched, stack_of
from real_settings import SCALED, SHARES, Group, Setting, groups, sizes
from real_tables import markdown

from streamcollapse import Plan, RunSettings, Streaming, inspect
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.run.held_out import held_out_perplexities, held_out_text
from streamcollapse.run.opened import Job, open_job
from streamcollapse.storage.disk import write_whole

USED = ("seconds", "cpu_seconds", "bytes_read", "layers_read")


class Results:
    """The document of a model, which is written after each row."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in ("model", "layers", "tokens"):
            if found and found[name] != head[name]:
                raise SystemExit(f"{path}: its {name} is {found[name]}, not {head[name]}; choose another --save")
        self.document: dict[str, Any] = head | {"dense": {}, "rows": []} | found
        self.rows: list[dict[str, Any]] = self.document["rows"]

    def row(self, setting: Setting, wanted: int) -> dict[str, Any] | None:
        """What is known of ``setting`` with ``wanted`` layers."""
        return next((row for row in self.rows if (row["setting"], row["wanted"]) == (setting.name, wanted)), None)

    def add(self, setting: Setting, wanted: int, **more: Any) -> None:
        """A row is known."""
        self.rows.append({"setting": setting.name, **setting.method, "wanted": wanted, **more})
        plan = more.get("plan")
        print(f"{setting.name}, {wanted} layers: " + str({k: v for k, v in more.items() if v is not plan}), flush=True)
        self.save()

    def save(self) -> None:
        """Write it, a row on a line."""
        head = json.dumps({name: value for name, value in self.document.items() if name != "rows"}, indent=1)
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
        write_whole(self._path, head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n')


class Searches:
    """Searches of one model, each at most ``limit`` seconds; what they come to is added to ``results``."""

    def __init__(self, source: Path, results: Results, limit: float) -> None:
        self._source, self._results, self._limit = source, results, limit

    def run(self, group: Group, wanted: list[int], scaled: list[int], only: list[str]) -> None:
        """The sizes that ``results`` lack: those ``wanted``, and with scales those of ``scaled``."""
        found, plain = self._results, group.plain
        missing = [n for n in wanted if not found.row(plain, n)] if not only or plain.name in only else []
        with tempfile.TemporaryDirectory() as work:
            if plain.is_nested and missing:
                self._walked(plain, missing, Path(work) / "path")
            elif not plain.is_nested:
                for n in missing:
                    self._each(plain, n, Path(work) / f"{n}")
            before = plain
            for setting, at in ((group.exchanged, wanted), (group.scaled, scaled)):
                if setting is not None and (not only or setting.name in only):
                    for n in (n for n in at if not found.row(setting, n)):
                        self._onward(setting, n, Path(work) / f"{n} {setting.name}", found.row(before, n))
                before = setting or before

    def _walked(self, setting: Setting, missing: list[int], work: Path) -> None:
        """One search to the fewest layers of ``missing``, which passes the others; greedy search goes on from the
        smallest stack that is known, where they are all smaller."""
        known = [row for row in self._results.rows if row["setting"] == setting.name and row["status"] == "found"]
        last = min(known, key=lambda row: row["layers"], default=None) if setting.has_effort else None
        last = None if last is None or last["layers"] <= max(missing) else last
        found = searched(self._source, setting.options(min(missing)), work, self._limit, last["plan"] if last else None)
        layers = original_layers(self._results.document["layers"]) if last is None else stack_of(last["plan"])
        passed = found.decisions
        for n in missing:
            count = len(layers) - n
            if len(passed) >= count:
                used = {key: passed[count - 1][key] + (last[key] if last else 0) for key in USED}
                self._add(setting, n, setting.stack(layers, passed[:count]), used)
            else:
                self._results.add(setting, n, **self._nothing(found, len(layers)))

    def _each(self, setting: Setting, wanted: int, work: Path) -> None:
        """A search for ``wanted`` layers."""
        found = searched(self._source, setting.options(wanted), work, self._limit)
        if found.end is None:
            self._results.add(setting, wanted, **self._nothing(found, self._results.document["layers"]))
        else:
            self._add(setting, wanted, stack_of(found.end["plan"]), {key: found.end[key] for key in USED})

    def _onward(self, setting: Setting, wanted: int, work: Path, without: dict[str, Any] | None) -> None:
        """The exchanges, or the scales, for what the row ``without`` them has."""
        if without is None or without["layers"] is None:
            raise SystemExit(f"{setting.name}, {wanted} layers: needs the row without them first")
        found = searched(self._source, setting.options(wanted), work, self._limit, without["plan"])
        if found.end is None:
            self._results.add(setting, wanted, **self._nothing(found, wanted))
        else:
            used = {key: without[key] + found.end[key] for key in USED}
            self._add(setting, wanted, stack_of(found.end["plan"]), used)

    def _nothing(self, found: Searched, num_layers: int) -> dict[str, Any]:
        why = f"broken off after {self._limit:g} s" if found.refused is None else f"refused: {found.refused}"
        merged = sum(decision["merged"] for decision in found.decisions)
        return {"status": why, "layers": None, "reached": num_layers - merged, "decisions": found.decisions}

    def _add(self, setting: Setting, wanted: int, layers: tuple[PlanLayer, ...], used: dict[str, Any]) -> None:
        plan = [[layer.base, {str(s): c for s, c in layer.mix.items()}] for layer in layers]
        self._results.add(setting, wanted, status="found", layers=len(layers), **used, plan=plan)


def score(source: Path, results: Results, folder: Path) -> None:
    """The loss of the original, and of all rows that have none, on each kind of text: a walk for each kind. Texts are
    written into ``folder``."""
    document, new = results.document, [row for row in results.rows if row["status"] == "found" and "nll" not in row]
    nlls: dict[str, dict[str, float]] = {repr(row["plan"]): row["nll"] for row in results.rows if "nll" in row}
    job = open_job(source, RunSettings())
    plans = {repr(row["plan"]): _plan(job, row["plan"]) for row in new if repr(row["plan"]) not in nlls}
    nlls |= {name: {} for name in plans}
    for kind, contents in held_out().items() if plans else ():
        file = folder / f"{kind}.txt"
        file.write_text(contents, encoding="utf-8")
        text = held_out_text(job, file, document["tokens"])
        dense, *found = held_out_perplexities(job, text, list(plans.values()), Streaming())
        document["dense"][kind] = dense.nll
        for name, one in zip(plans, found, strict=True):
            nlls[name][kind] = one.nll
        print(f"{kind}: {document['tokens']} tokens, loss {dense.nll:.4f}, {len(plans)} plans", flush=True)
    for row in new:
        row["nll"] = nlls[repr(row["plan"])]
        row["rise"] = {kind: nll - document["dense"][kind] for kind, nll in row["nll"].items()}
        row["perplexity"] = {kind: math.exp(min(nll, 700.0)) for kind, nll in row["nll"].items()}
        print(f"{row['setting']}, {row['wanted']} layers: rise {row['rise']}", flush=True)
    results.save()


def _plan(job: Job, layers: list[Any]) -> Plan:
    return Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), stack_of(layers))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "bundled")
    parser.add_argument("--source", type=Path, help="a checkpoint directory instead")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="SETTING")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--scales-at", nargs="*", type=float, default=list(SCALED))
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--note", help="said in the results, such as what else the machine did")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE")
    given = parser.parse_args()
    names = [setting.name for group in groups() for setting in (group.plain, group.exchanged, group.scaled) if setting]
    if unknown := [name for name in given.only if name not in names]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(names)}")
    if not given.table and given.save is None:
        parser.error("--save is missing")
    return given


def main() -> None:
    given = options()
    if given.table:
        print(markdown([json.loads(path.read_text(encoding="utf-8")) for path in given.table]))
        return
    print(__doc__.split("\n\n")[1])
    torch.set_num_threads(given.threads)
    bundled = Path(str(resources.files("streamcollapse.data"))) / "wiki-llama-24l"
    source = given.source or chosen_model(given) or bundled
    num_layers = inspect(source).num_layers
    told = {"note": given.note, "model": source.name if given.source else given.model, "layers": num_layers}
    when = {"date": datetime.now(UTC).date().isoformat(), "environment": environment(given.threads)}
    head = {"benchmark": "real", **when, **told, "tokens": given.tokens}
    results = Results(given.save, head)
    wanted = sizes(num_layers, given.shares)
    scaled = [n for share, n in zip(given.shares, wanted, strict=True) if share in given.scales_at]
    searches = Searches(source, results, given.limit)
    for group in groups():
        searches.run(group, wanted, scaled, given.only)
    with tempfile.TemporaryDirectory() as folder:
        score(source, results, Path(folder))
    print(json.dumps(results.document))


if __name__ == "__main__":
    main()
