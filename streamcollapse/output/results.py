"""Results as people name them: plans, and directories of pruned models, which hold theirs; and what a comparison of
them says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from streamcollapse.errors import OptionError, PlanError, printable
from streamcollapse.merge.composing import compose
from streamcollapse.merge.plan import PLAN_FILE, Plan
from streamcollapse.output.checkpoint import REPORT_FILE
from streamcollapse.output.report import Report, load_report
from streamcollapse.resources.meter import Usage
from streamcollapse.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Result:
    """A ``plan`` and what it is called; ``directory`` and ``report`` of the model, where there is one."""

    name: str
    plan: Plan
    directory: Path | None = None
    report: Report | None = None


@dataclass(frozen=True)
class ComparedModel:
    """A model of a comparison. ``num_bytes`` of weights, ``nll`` in nats per predicted token, ``rise`` of it over the
    source's; None where what it computes overflows. ``tokens_per_second``: generated, where that was asked for."""

    name: str
    method: str
    layers: int
    num_bytes: int
    nll: float | None
    rise: float | None
    perplexity: float | None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Comparison:
    """``models``: the source first, then the plans as they were given; on ``tokens`` predicted tokens of ``text``."""

    source: str
    text: str
    tokens: int
    models: list[ComparedModel]
    compute: dict[str, str]
    usage: Usage

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return asdict(self)


def load_results(paths: Sequence[str | Path]) -> list[Result]:
    """The results at ``paths``, each a plan or the directory of a pruned model, called by the last part of its path
    where that tells them apart. One that was made of another of them, as a healed model is of a pruned one, is taken as
    made of that one's source. Raises PlanError, also where they are not all of one source, and CheckpointError."""
    if not paths:
        raise OptionError("no plan is given; give plans, or directories of pruned models")
    given = [Path(path) for path in paths]
    short = [path.name or str(path) for path in given]
    names = short if len(set(short)) == len(short) else [str(path) for path in given]
    found = [_load(path, printable(name)) for path, name in zip(given, names, strict=True)]
    if len({_source_key(one) for one in found}) > 1:
        found = _of_the_first_source(found)
    first = found[0]
    for path, other in zip(given[1:], found[1:], strict=True):
        if _source_key(other) != _source_key(first):
            raise PlanError(
                f"{path}: is of another source ({_source(other.plan)}) than {given[0]} ({_source(first.plan)}); give "
                "plans of one source"
            )
    return found


def _source_key(result: Result) -> tuple[str, int]:
    return result.plan.fingerprint, result.plan.num_source_layers


def _of_the_first_source(results: Sequence[Result]) -> list[Result]:
    """Those whose source is itself one of ``results`` with the plan of that put before theirs, as often as it takes."""
    made = {Checkpoint(one.directory).fingerprint(): one for one in results if one.directory is not None}
    found = []
    for result in results:
        seen = {result.plan.fingerprint}
        while (lower := made.get(result.plan.fingerprint)) is not None and lower.plan.fingerprint not in seen:
            seen.add(lower.plan.fingerprint)
            result = replace(result, plan=_after(lower.plan, result.plan))
        found.append(result)
    return found


def _after(lower: Plan, upper: Plan) -> Plan:
    """What ``upper`` makes of the result of ``lower``, with what both say of how they came about."""
    return replace(
        compose(lower, upper),
        search=lower.search if upper.search is None else None,  # two searches are none of one source
        repair=upper.repair or lower.repair,
        heal=upper.heal or lower.heal,
        origin=upper.origin,
    )


def _load(path: Path, name: str) -> Result:
    if not path.is_dir():
        return Result(name, Plan.load(path))
    if not (path / PLAN_FILE).is_file():
        raise PlanError(f"{path}: holds no {PLAN_FILE}; give a plan, or the directory of a pruned model")
    report = load_report(path / REPORT_FILE) if (path / REPORT_FILE).is_file() else None
    return Result(name, Plan.load(path / PLAN_FILE), path, report)


def _source(plan: Plan) -> str:
    return f"{plan.source_name}, {plan.num_source_layers} layers, fingerprint {plan.fingerprint[:12]}…"


def source_of(results: Sequence[Result], given: str | Path | None = None) -> str | Path | None:
    """The checkpoint that ``results`` are of: what was ``given``, or what a report says and is still there."""
    recorded = (result.report["source"] for result in results if result.report is not None)
    ours = (one.get("path") for one in recorded if one.get("fingerprint") == results[0].plan.fingerprint)
    return given or next((path for path in ours if path and Path(path).is_dir()), None)
