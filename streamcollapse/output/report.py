"""``streamcollapse_report.json``: what a run did and what it cost."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic reads no other before Python 3.12
)

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from streamcollapse.errors import CheckpointError
from streamcollapse.merge.plan import Plan
from streamcollapse.output.verdict import Judgement
from streamcollapse.resources.meter import Usage
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.disk import write_whole
from streamcollapse.storage.index import read_json
from streamcollapse.storage.source import TensorSource

FORMAT = "streamcollapse.report/1"


class Change(TypedDict):
    """A figure of the source, and of what came of it."""

    before: int
    after: int


class Healed(TypedDict):
    """The course of healing: the loss of each step, and that on held-out text by the number of steps before it;
    ``unhealed``: what the model came to before on the text of the verdict, in nats per token."""

    losses: list[float]
    judged: dict[str, float]
    stopped: str | None
    unhealed: NotRequired[float | None]


class Report(TypedDict):
    """What a run did and what it cost, as JSON types. ``shards`` maps file names to sha256. ``ratio`` is pruned
    parameters over all parameters, as in the paper's Table 1. ``held_out``: the verdict; None where none was asked, or
    none could be had. ``healing``: how that went, where there was one; the verdict is then beside the teacher."""

    format: str
    versions: dict[str, str]
    source: dict[str, str]
    options: dict[str, Any]
    compute: dict[str, str]
    layers: Change
    parameters: Change
    bytes: Change
    ratio: float
    shards: dict[str, str]
    usage: Usage
    held_out: NotRequired[Judgement | None]
    healing: NotRequired[Healed]


@dataclass(frozen=True)
class Sizes:
    """Layers, parameters (floating-point elements stored) and bytes of weights."""

    layers: int
    parameters: int
    bytes: int


def sizes(source: TensorSource, layers: int) -> Sizes:
    """Count a source that describes a model of ``layers`` decoder layers."""
    infos = [source.info(name) for name in source.names]
    parameters = sum(info.num_elements for info in infos if info.dtype.is_floating_point)
    return Sizes(layers, parameters, sum(info.num_bytes for info in infos))


def build_report(
    checkpoint: Checkpoint,
    plan: Plan,
    after: Sizes,
    compute: dict[str, str],
    options: dict[str, Any],
    usage: Usage,
    shards: dict[str, str],
) -> Report:
    """The report of the run that made what measures ``after`` by ``plan``."""
    before, path = sizes(checkpoint, plan.num_source_layers), str(checkpoint.directory.absolute())
    return Report(
        format=FORMAT,
        versions=versions(),
        source={"path": path, "name": plan.source_name, "fingerprint": plan.fingerprint},
        options=options,
        compute=compute,
        layers=Change(before=before.layers, after=after.layers),
        parameters=Change(before=before.parameters, after=after.parameters),
        bytes=Change(before=before.bytes, after=after.bytes),
        ratio=1.0 - after.parameters / before.parameters,
        shards=shards,
        usage=usage,
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def versions() -> dict[str, str]:
    """The versions of this package and of those that results depend on."""
    packages = ("streamcollapse", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def load_report(path: Path) -> Report:
    """The report at ``path``. Raises CheckpointError."""
    try:
        return TypeAdapter(Report).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{path}: is no report: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def recorded_shards(path: Path) -> dict[str, str]:
    """sha256 by file name, as the report or the conversion's record at ``path`` has them. Raises CheckpointError."""
    document = read_json(path)
    shards = document.get("shards", {}) if isinstance(document, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(value, str) for value in shards.values()):
        raise CheckpointError(f"{path}: its shards are not names and digests")
    return shards


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Write ``report`` to ``path``. Raises OutputError."""
    write_whole(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
