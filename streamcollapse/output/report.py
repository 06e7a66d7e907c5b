"""``streamcollapse_report.json``: what a run did and what it cost."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from streamcollapse.errors import CheckpointError
from streamcollapse.merge.plan import Plan
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.disk import write_whole
from streamcollapse.storage.index import read_json
from streamcollapse.storage.source import TensorSource

FORMAT = "streamcollapse.report/1"


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
    usage: dict[str, Any],
    shards: dict[str, str],
) -> dict[str, Any]:
    """The report as JSON types. ``shards`` maps file names to sha256. ``ratio`` is pruned parameters over all
    parameters, as in the paper's Table 1."""
    before = sizes(checkpoint, plan.num_source_layers)
    return {
        "format": FORMAT,
        "versions": versions(),
        "source": {"path": str(checkpoint.directory), "name": plan.source_name, "fingerprint": plan.fingerprint},
        "options": options,
        "compute": compute,
        "layers": {"before": before.layers, "after": after.layers},
        "parameters": {"before": before.parameters, "after": after.parameters},
        "bytes": {"before": before.bytes, "after": after.bytes},
        "ratio": 1.0 - after.parameters / before.parameters,
        "shards": shards,
        "usage": usage,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def versions() -> dict[str, str]:
    """The versions of this package and of those that results depend on."""
    packages = ("streamcollapse", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def load_report(path: Path) -> dict[str, Any]:
    """The report at ``path``. Raises CheckpointError."""
    report = read_json(path)
    if not isinstance(report, dict):
        raise CheckpointError(f"{path}: is no report")
    return report


def save_report(report: dict[str, Any], path: Path) -> None:
    """Write ``report`` to ``path``. Raises OutputError."""
    write_whole(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
