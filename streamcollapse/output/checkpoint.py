"""A pruned checkpoint directory, whole: shards, index, config, companion files, plan, report, card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from streamcollapse.arch.config import CONFIG_FILE, ModelConfig, config_text, pruned_config
from streamcollapse.merge.plan import Plan
from streamcollapse.output.card import model_card
from streamcollapse.output.files import companion_files, copy_files
from streamcollapse.output.report import save_report
from streamcollapse.progress import Listener, TensorWritten
from streamcollapse.storage.source import TensorSource
from streamcollapse.storage.writer import ShardPlan, disk_errors, write_shards
from streamcollapse.stream.meters import Meter

PLAN_FILE = "streamcollapse_plan.json"
REPORT_FILE = "streamcollapse_report.json"


def write_weights(
    view: TensorSource, shards: list[ShardPlan], stage: Path, device: torch.device, meter: Meter, listener: Listener
) -> None:
    """Write ``shards`` of ``view`` into ``stage``, counting bytes. Raises OutputError, NonFiniteError."""

    def written(name: str, num_bytes: int) -> None:
        meter.written(num_bytes)
        listener(TensorWritten(name, num_bytes))

    write_shards(view, shards, stage, device, written)


def write_companions(
    stage: Path, source_directory: Path, config: ModelConfig, plan: Plan, report: dict[str, Any], with_code: bool
) -> None:
    """Write everything but the weights into ``stage``. Raises OutputError."""
    copy_files(companion_files(source_directory, with_code), stage)
    plan.save(stage / PLAN_FILE)
    save_report(report, stage / REPORT_FILE)
    bases = [layer.base for layer in plan.layers]
    for name, text in {
        CONFIG_FILE: config_text(pruned_config(config, bases)),
        "README.md": model_card(plan, report, source_directory / "README.md"),
    }.items():
        with disk_errors(stage / name):
            (stage / name).write_text(text, encoding="utf-8")
