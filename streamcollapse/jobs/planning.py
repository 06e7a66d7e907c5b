"""Plans without a search: made by hand for a source, or put together from two."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from streamcollapse.arch import architecture as likeness
from streamcollapse.errors import OptionError
from streamcollapse.merge.composing import compose, hand_made, parse_group, parse_layers, refuse_identity, to_mergekit
from streamcollapse.merge.plan import Plan
from streamcollapse.merge.view import check_plan
from streamcollapse.run.opened import open_job
from streamcollapse.run.refits import carry_refits
from streamcollapse.settings.run import Compute, RunSettings


def make_plan(
    source: str | Path,
    drop: str | None = None,
    merge: Sequence[str] = (),
    *,
    merge_norms: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """A plan for the checkpoint ``source`` without the layers ``drop`` (``21-29``, from 0) and with each of ``merge``
    (``12-15:mean``) as one; reads headers only. Raises StreamCollapseError."""
    dropped = [] if drop is None else parse_layers(drop)
    groups = [parse_group(text) for text in merge]
    job = open_job(source, RunSettings(Compute("cpu"), trust_remote_code=trust_remote_code))
    layers = hand_made(job.num_layers, dropped, groups)
    plan = Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), layers, merge_norms)
    check_plan(plan, plan.fingerprint, job.checkpoint, job.architecture.layout)
    refuse_identity(plan)
    likeness.check_prunable(job.architecture, [layer.base for layer in layers], trust_remote_code)
    return plan


def compose_plans(first: str | Path, second: str | Path) -> Plan:
    """One plan for the source of the plan in the file ``first``, of both. What was fitted anew is looked for where the
    second is: beside its file, or in the checkpoint that it lies in. Raises PlanError."""
    lower, upper = Plan.load(first), Plan.load(second)
    return replace(compose(lower, upper), origin=upper.origin)


def save_composed(plan: Plan, first: str | Path, second: str | Path, path: Path) -> None:
    """Write ``plan``, composed of those in the files ``first`` and ``second``, to ``path``, with what was fitted anew
    beside it. Raises PlanError where that cannot be had there, OutputError."""
    carry_refits(plan, [Plan.load(first), Plan.load(second)], path)
    plan.save(path)


EXPORTS = ("mergekit",)


def export_plan(source: str | Path, plan: Plan, to: str, *, trust_remote_code: bool = False) -> str:
    """``plan`` of the checkpoint ``source`` in the words of the tool ``to`` (one of ``EXPORTS``), as a document; reads
    headers only.

    Raises StreamCollapseError.
    """
    if to not in EXPORTS:
        raise OptionError(f"tool {to!r} is unknown; choose one of {', '.join(EXPORTS)}")
    job = open_job(source, RunSettings(Compute("cpu"), trust_remote_code=trust_remote_code))
    layout = job.architecture.layout
    check_plan(plan, job.checkpoint.fingerprint(), job.checkpoint, layout)
    dtype = str(job.architecture.weights_dtype).removeprefix("torch.")
    document = to_mergekit(plan, layout, str(job.checkpoint.directory.resolve()), dtype)
    return f"# {plan.num_layers} of {plan.num_source_layers} layers of {job.name}\n" + yaml.safe_dump(
        document, sort_keys=False
    )
